"""Padded batches of token rows, and the loss of their labels. Legend: K lanes, B rows, T tokens, N learned tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from datasets_partition.store.tokens import IDS

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: token ids, 1 where a token is real, and labels (IGNORED where nothing is learned).

    `tokens` of them are real. The loss is over the N tokens that follow the positions `row_N, place_N`. These are
    computed on the CPU, because asking a GPU for them would wait for it. `columns` are an objective's other columns, by
    name: tensors (B, ...) of a value or several for each sequence. A row of the data is `group` sequences, one after
    another: `units` rows are real, and others only fill a lane.
    """

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    labels_BT: torch.Tensor
    tokens: int
    row_N: torch.Tensor
    place_N: torch.Tensor
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    group: int = 1
    units: int = 0

    @classmethod
    def of(
        cls, ids_BT: torch.Tensor, attention_BT: torch.Tensor, labels_BT: torch.Tensor, tokens: int, group: int = 1
    ) -> Batch:
        """Makes a batch of real rows on the CPU."""
        row_N, place_N = (labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True)  # nothing predicts the first token
        units = len(ids_BT) // group
        return cls(ids_BT, attention_BT, labels_BT, tokens, row_N, place_N, group=group, units=units)

    @classmethod
    def padded(cls, ids: np.ndarray, learned: np.ndarray, lengths_B: np.ndarray, pad: int, group: int = 1) -> Batch:
        """Makes a batch (B, T) of sequences whose token ids, and whether each is learned, lie one after another."""
        real_BT = np.arange(lengths_B.max()) < lengths_B[:, None]
        ids_BT, labels_BT = np.full(real_BT.shape, pad, np.int64), np.full(real_BT.shape, IGNORED, np.int64)
        ids_BT[real_BT] = ids
        labels_BT[real_BT] = np.where(learned, ids, IGNORED)
        vectors = (torch.from_numpy(ids_BT), torch.from_numpy(real_BT.astype(np.int64)), torch.from_numpy(labels_BT))
        return cls.of(*vectors, len(ids), group)

    @classmethod
    def side_by_side(cls, pieces: Sequence[Batch | None], pad: int) -> Batch:
        """Makes one batch (K * B, T) of K lanes' pieces; padding, and zeros in `columns`, fill what a lane lacks."""
        present = {lane: piece for lane, piece in enumerate(pieces) if piece is not None}

        def stacked(values: Mapping[int, torch.Tensor], fill: int) -> torch.Tensor:
            shape = np.max([value.shape for value in values.values()], 0).tolist()
            together = next(iter(values.values())).new_full((len(pieces), *shape), fill)
            for lane, value in values.items():
                together[lane][tuple(slice(size) for size in value.shape)] = value
            return together.flatten(0, 1)

        ids_BT = stacked({lane: piece.ids_BT for lane, piece in present.items()}, pad)
        attention_BT = stacked({lane: piece.attention_BT for lane, piece in present.items()}, 0)
        attention_BT[:, 0] = 1  # a row that attends to nothing would be NaN
        labels_BT = stacked({lane: piece.labels_BT for lane, piece in present.items()}, IGNORED)
        first, tokens = next(iter(present.values())), sum(piece.tokens for piece in present.values())
        columns = {
            name: stacked({lane: piece.columns[name] for lane, piece in present.items()}, 0) for name in first.columns
        }
        units = sum(piece.units for piece in present.values())
        return replace(cls.of(ids_BT, attention_BT, labels_BT, tokens, first.group), columns=columns, units=units)

    @property
    def learned(self) -> int:
        """How many tokens the loss is over."""
        return len(self.row_N)

    def to(self, device: torch.device) -> Batch:
        """Returns the same batch on another device."""
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            attention_BT=self.attention_BT.to(device),
            labels_BT=self.labels_BT.to(device),
            row_N=self.row_N.to(device),
            place_N=self.place_N.to(device),
            columns={name: values.to(device) for name, values in self.columns.items()},
        )

    def plus(self, columns: Mapping[str, torch.Tensor]) -> Batch:
        """Returns the batch with more columns."""
        return replace(self, columns={**self.columns, **columns})


def token_losses(
    network: nn.Module, batch: Batch, *, every_logit: bool = False, temperature: float = 1.0
) -> torch.Tensor:
    """Computes the nats of each learned token (N,); `every_logit` as in `token_logits`."""
    logits_NV = token_logits(network, batch, every_logit=every_logit)
    if temperature != 1:
        logits_NV = logits_NV / temperature
    return F.cross_entropy(logits_NV, batch.labels_BT[:, 1:][batch.row_N, batch.place_N], reduction="none")


def token_logits(network: nn.Module, batch: Batch, *, every_logit: bool = False) -> torch.Tensor:
    """Computes the logits (N, V) that predict each learned token, in float32 or wider.

    The head sees these positions alone, or all with `every_logit`.
    """
    learned, selected = (batch.row_N, batch.place_N), False

    def select(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        nonlocal selected
        selected = True
        return inputs[0][learned][None]

    head: Any = None if every_logit else network.get_output_embeddings()  # type: ignore[operator]
    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        # Without a mask, attention has a faster kernel.
        mask_BT = None if batch.tokens == batch.ids_BT.numel() else batch.attention_BT
        logits = network(input_ids=batch.ids_BT, attention_mask=mask_BT, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    logits_NV = logits[0] if selected else logits[learned]
    # Half precision is too coarse for the softmax.
    wide: torch.Tensor = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return wide


def sequence_sums(values_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns the sum (B,) of each sequence's learned tokens; 0 without any."""
    return values_N.new_zeros(len(batch.ids_BT)).index_add(0, batch.row_N, values_N)


def sequence_counts(batch: Batch) -> torch.Tensor:
    """Returns the number (B,) of each sequence's learned tokens, int64."""
    return batch.row_N.new_zeros(len(batch.ids_BT)).index_add(0, batch.row_N, torch.ones_like(batch.row_N))


def lengths(rows: pa.RecordBatch, name: str = "input_ids") -> np.ndarray:
    """Returns the number of tokens of each encoded row (B,)."""
    return np.diff(rows[name].offsets.to_numpy())


def longest(rows: pa.RecordBatch) -> np.ndarray:
    """Returns the number of tokens of each encoded row's longest sequence (B,)."""
    longest_B: np.ndarray = np.stack([lengths(rows, name) for name in rows.schema.names if name.endswith(IDS)]).max(0)
    return longest_B


def flattened(lists: pa.ListArray) -> np.ndarray:
    """Returns the values of all lists one after another, as a view."""
    offsets = lists.offsets
    values: np.ndarray = lists.values.to_numpy()
    return values[offsets[0].as_py() : offsets[-1].as_py()]


def split(lists: pa.ListArray) -> list[np.ndarray]:
    """Returns the values of each list, as views."""
    return np.split(flattened(lists), np.diff(lists.offsets).cumsum()[:-1]) if len(lists) else []
