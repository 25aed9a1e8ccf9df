"""Greedy continuations of prompts. Legend: B rows, T tokens."""

import json
from typing import Any

import torch

from datasets_partition.core.turns import Conversation
from engine.objectives.base import Tokenizer

Prompt = str | Conversation


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


def words(turn: dict[str, Any]) -> str:
    """Writes what a turn says: its content, and as JSON what else it has for the chat template."""
    more = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return " ".join(filter(None, (turn["content"], json.dumps(more, ensure_ascii=False) if more else "")))
