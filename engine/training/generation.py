"""Greedy continuations of prompts. Legend: B rows, T tokens."""

from typing import Any

import torch

from datasets_partition.core.turns import words
from engine.objectives.base import Prompt, Tokenizer


@torch.no_grad()
def continuations(
    network: Any, pad: int, device: torch.device, tokenizer: Tokenizer, prompts: list[Prompt], tokens: int
) -> list[str]:
    """Returns a greedy continuation of each prompt by the present weights; a chat template renders conversations."""
    network.eval()
    texts = []
    for prompt in prompts:
        # An empty prompt starts after the end token, where the previous text ended.
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            options = {**prompt.options, "add_generation_prompt": True, "return_dict": False}
            ids = tokenizer.apply_chat_template(prompt.turns, **options)
        ids = ids or [tokenizer.eos_token_id]
        ids_BT = torch.tensor([ids], device=device)
        how = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
        out = network.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **how)
        texts.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
    return texts


def as_text(prompt: Prompt) -> str:
    """Writes a prompt for people to read."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {words(turn)}" for turn in prompt.turns)
