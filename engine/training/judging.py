"""Held-out loss and generations of a vector, client by client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from engine.config.federation import Evaluate
from strategies.core.seeds import rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]  # a text, or the turns of a conversation


@dataclass(frozen=True)
class ClientLoss:
    """One client's held-out loss: the summed negative log-likelihood in nats, over how many tokens and rows."""

    client: int
    nll: float
    tokens: int
    rows: int


def drawn_rows(rows: int, client: int, evaluate: Evaluate, seed: int) -> np.ndarray:
    """The sorted numbers of the rows that count for a client: all, or `evaluate.rows` drawn once by the seed."""
    if rows <= evaluate.rows:
        return np.arange(rows)
    return np.sort(rng(seed, 0, client, "evaluate").choice(rows, evaluate.rows, replace=False))


class Judged(Protocol):
    """A model that can be judged: a trainer's, whole or in shards."""

    def nll(self, rows: pa.RecordBatch, batch: int) -> tuple[float, int]:
        """Returns the summed loss in nats of the present vector over all rows, and over how many tokens."""
        ...


def client_loss(judged: Judged, client: int, rows: pa.RecordBatch, evaluate: Evaluate, seed: int) -> ClientLoss:
    """The loss of the vector now in the model on a client's held-out rows.

    Batches hold rows of one client only, so that the bits do not depend on which clients a slot was given.
    """
    picked = drawn_rows(rows.num_rows, client, evaluate, seed)
    nll, learnt = judged.nll(rows.take(picked), evaluate.batch)
    return ClientLoss(client, nll, learnt, len(picked))


def mean_loss(losses: list[ClientLoss]) -> float:
    """Nats per token over all clients' rows; summed in the order of clients, so that the bits are fixed."""
    ordered = sorted(losses, key=lambda loss: loss.client)
    tokens = sum(loss.tokens for loss in ordered)
    return sum(loss.nll for loss in ordered) / tokens if tokens else float("nan")


@torch.no_grad()
def continuations(
    network: Any, pad: int, device: torch.device, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], tokens: int
) -> list[str]:
    """Greedy continuations of at most `tokens` tokens, one text per prompt, by the weights now in the network.

    Turns of a conversation become text by the tokenizer's chat template.
    """
    network.eval()
    texts = []
    for prompt in prompts:
        # With nothing to go on, the model begins where a text before has ended.
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
        found: list[int] = tokenizer(prompt)["input_ids"]
    else:
        found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return found


def as_text(prompt: Prompt) -> str:
    """A prompt as people read it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
