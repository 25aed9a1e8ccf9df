"""Supervised fine-tuning: next-token loss on completions. Legend: B rows, T tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from datasets_partition.core.canonical import (
    MESSAGES,
    PREFERENCE,
    PROMPT_ONLY,
    UNPAIRED_PREFERENCE,
    content_columns,
    format_of,
)
from engine.objectives.chat_template import encode_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

# What cannot be learnt from, as people call it.
REFUSED = {PREFERENCE: "preference pairs", UNPAIRED_PREFERENCE: "unpaired preferences", PROMPT_ONLY: "prompts alone"}

Encoded = tuple[list[int] | None, list[int] | None]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: token ids, 1 where a token is real, and labels (-100 where nothing is learnt).

    `tokens` are real. The loss is over the N tokens after the places `row_N, place_N`, which are known beforehand: a
    GPU that is asked for them would be waited for.
    """

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    labels_BT: torch.Tensor
    tokens: int
    row_N: torch.Tensor
    place_N: torch.Tensor

    @classmethod
    def of(cls, ids_BT: torch.Tensor, attention_BT: torch.Tensor, labels_BT: torch.Tensor, tokens: int) -> Batch:
        """A batch on the CPU."""
        # The first token has nothing before it to be predicted from.
        return cls(ids_BT, attention_BT, labels_BT, tokens, *(labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True))

    @property
    def learnt(self) -> int:
        """How many tokens the loss is over."""
        return len(self.row_N)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        vectors = (self.ids_BT.to(device), self.attention_BT.to(device), self.labels_BT.to(device))
        return Batch(*vectors, self.tokens, self.row_N.to(device), self.place_N.to(device))


@dataclass(frozen=True)
class Sft:
    """Trains on the completion's tokens and an end token; a row with an empty prompt is trained whole.

    Of messages it trains on the assistant's turns. Tokens and mask are those of TRL's SFTTrainer: prompt + completion
    tokenized together, the completion beginning where that first differs from the prompt alone, and the row's end cut
    at `max_length`. Logits are computed where a label is, or with `every_logit` at all positions, for who needs to know
    of each layer which row its inputs are of.
    """

    max_length: int
    every_logit: bool = field(default=False, repr=False)  # token columns do not depend on it

    def encode(self, rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
        """`input_ids` and `mask` (1 = learnt) per row; null ids where the cut leaves nothing to learn.

        Raises ValueError for rows of a format that this objective does not learn from.
        """
        kind = format_of(rows)
        if kind in REFUSED:
            raise ValueError(
                f'train.objective = "sft" learns from text, prompt and completion, or messages, but the rows are '
                f"{REFUSED[kind]} ({', '.join(content_columns(rows))}): name a prompt and a completion in "
                f"data.source.columns"
            )
        encoded = self._conversations(rows, tokenizer) if kind == MESSAGES else self._completions(rows, tokenizer)
        ids, masks = zip(*encoded, strict=True)
        return pa.table(
            {"input_ids": pa.array(ids, pa.list_(pa.int32())), "mask": pa.array(masks, pa.list_(pa.int8()))}
        )

    def _completions(self, rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        end = tokenizer.eos_token
        prompts = rows["prompt"].to_pylist()
        wholes = [
            prompt + (completion if completion.endswith(end) else completion + end)
            for prompt, completion in zip(prompts, rows["completion"].to_pylist(), strict=True)
        ]
        prompt_ids = tokenizer(prompts)["input_ids"]
        whole_ids = tokenizer(wholes)["input_ids"]
        encoded = []
        for prompt, whole in zip(prompt_ids, whole_ids, strict=True):
            shared = next((i for i, (p, w) in enumerate(zip(prompt, whole, strict=False)) if p != w), len(prompt))
            encoded.append(self._cut(whole, [0] * shared + [1] * (len(whole) - shared)))
        return encoded

    def _conversations(self, rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        ids, masks = encode_conversations(rows["messages"].to_pylist(), tokenizer)
        return [self._cut(*row) for row in zip(ids, masks, strict=True)]

    def _cut(self, ids: list[int], mask: list[int]) -> Encoded:
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        # The first token has nothing before it to be predicted from.
        return (ids, mask) if any(mask[1:]) else (None, None)

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Encoded rows as a batch (B, T), padded on the right with `pad` to the longest."""
        lengths_B = lengths(rows)
        ids, learnt = _flat(rows["input_ids"]), _flat(rows["mask"]) != 0
        real_BT = np.arange(lengths_B.max()) < lengths_B[:, None]
        ids_BT, labels_BT = np.full(real_BT.shape, pad, np.int64), np.full(real_BT.shape, IGNORED, np.int64)
        ids_BT[real_BT] = ids
        labels_BT[real_BT] = np.where(learnt, ids, IGNORED)
        vectors = (torch.from_numpy(ids_BT), torch.from_numpy(real_BT.astype(np.int64)), torch.from_numpy(labels_BT))
        return Batch.of(*vectors, len(ids))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        """The summed negative log-likelihood of the learnt tokens in nats (a scalar), and how many they are."""
        return self._each_token(model, batch).sum(), batch.learnt

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The same sum for each row by itself (B,)."""
        nll_N = self._each_token(model, batch)
        return nll_N.new_zeros(len(batch.ids_BT)).index_add(0, batch.row_N, nll_N)

    def _each_token(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Negative log-likelihood of each learnt token (N,) in nats."""
        learnt, selected = (batch.row_N, batch.place_N), False

        def select(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            nonlocal selected
            selected = True
            return inputs[0][learnt][None]

        head: Any = None if self.every_logit else model.get_output_embeddings()  # type: ignore[operator]
        hook = None if head is None else head.register_forward_pre_hook(select)
        try:
            # Without a mask, attention takes the faster way.
            mask_BT = None if batch.tokens == batch.ids_BT.numel() else batch.attention_BT
            logits = model(input_ids=batch.ids_BT, attention_mask=mask_BT, use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        logits_NV = logits[0] if selected else logits[learnt]
        # The softmax of half precision is done in single.
        wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        return F.cross_entropy(wide, batch.labels_BT[:, 1:][learnt], reduction="none")


def lengths(rows: pa.RecordBatch) -> np.ndarray:
    """How many tokens each encoded row has (B,)."""
    found: np.ndarray = np.diff(rows["input_ids"].offsets.to_numpy())
    return found


def _flat(lists: pa.ListArray) -> np.ndarray:
    """The values of all lists one after another, as a view."""
    offsets = lists.offsets
    values: np.ndarray = lists.values.to_numpy()
    return values[offsets[0].as_py() : offsets[-1].as_py()]
