"""Greedy continuations of prompts. Legend: B rows, T tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]  # a text, or the turns of a conversation


@torch.no_grad()
def continuations(
    network: Any, pad: int, device: torch.device, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], tokens: int
) -> list[str]:
    """Returns a greedy continuation of at most `tokens` tokens for each prompt, by the weights now in the network.

    The tokenizer's chat template turns a conversation into text.
    """
    network.eval()
    texts = []
    for prompt in prompts:
        # An empty prompt starts after the end token, where the previous text ended.
        ids = _ids(tokenizer, prompt) or [tokenizer.eos_token_id]
        ids_BT = torch.tensor([ids], device=device)
        out = network.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        texts.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
    return texts


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return ids


def as_text(prompt: Prompt) -> str:
    """Writes a prompt for people to read."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
