"""Kahneman-Tversky optimization (arXiv 2402.01306). Legend: B rows, one sequence each.

r is the log-ratio of a completion to the reference model; z0 the mean log-ratio of completions that belong to other
prompts, and not below 0. All equals TRL's KTOTrainer where its micro-batch is a client's step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from datasets_partition.core.turns import conversation_of, words
from datasets_partition.core.types import OPTIONS, PREFERENCE, UNPAIRED_PREFERENCE, format_of
from engine.messages.checks import above, at_least
from engine.objectives.base import NATS, REFERENCE, BaseObjective, Context, Period, Prompt, Reference, Term, Tokenizer
from engine.objectives.completions import encode_completions
from engine.objectives.pairs import wins
from engine.objectives.token_batch import (
    IGNORED,
    Batch,
    flattened,
    lengths,
    sequence_counts,
    sequence_sums,
    token_losses,
)

KEY = "train.objective"
LOSS, KL = "preference", "kl"
GOOD, MISMATCHED = "good", "mismatched"  # columns: 1 for a good completion; 1 where `kl_ids` is of another row
PAIRED = "rejected_"  # begins the names of a pair's other side
KL_COLUMNS = ("kl_tokens", "kl_real", "kl_scored")


@dataclass(frozen=True, kw_only=True)
class Kto(BaseObjective):
    """Raises good completions above the mean log-ratio z0, and lowers bad ones below it (eq. 7).

    A good completion's loss is desirable_weight (1 - sigmoid(beta (r - z0))), a bad one's undesirable_weight
    (1 - sigmoid(beta (z0 - r))). `kl` says where z0 is from: each step's own rows ("step": each prompt with the
    completion of the row before; a step of one row takes the client's next row), up to `kl_rows` of a client's rows
    with the model that the round starts from ("round"), or nowhere ("none": z0 = 0, TRL's apo_zero_unpaired, arXiv
    2408.06266). Weights are the recipe's and never follow from a client's own labels. Of a preference pair both sides
    become rows of their own.
    """

    kind: Literal["kto"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: Literal["step", "round", "none"] = "step"
    kl_rows: int = 32
    reference: Reference = "base"
    formats: ClassVar[tuple[str, ...]] = (UNPAIRED_PREFERENCE, PREFERENCE)
    losses: ClassVar[Mapping[str, float]] = {LOSS: NATS}
    heldout: ClassVar[str] = LOSS
    shown: ClassVar[tuple[str, ...]] = ("accuracy",)
    units: ClassVar[Mapping[str, str]] = {
        LOSS: "per row",
        "accuracy": "share",
        "chosen": "nats",
        "rejected": "nats",
        KL: "nats",
    }

    def __post_init__(self) -> None:
        above(KEY, 0, beta=self.beta)
        at_least(KEY, 0, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight)
        at_least(KEY, 2, kl_rows=self.kl_rows)

    @property
    def figures(self) -> Mapping[str, float]:
        """The share on the right side of z0, the log-ratios of good and of bad completions, and z0 before it is cut."""
        return {"accuracy": 1.0, "chosen": NATS, "rejected": NATS, **dict.fromkeys(self.means, NATS)}

    @property
    def means(self) -> tuple[str, ...]:
        """The mean log-ratio of mismatched completions."""
        return () if self.kl == "none" else (KL,)

    @property
    def means_over(self) -> Period:
        """A step or a round."""
        return "round" if self.kl == "round" else "step"

    @property
    def mean_rows(self) -> int:
        """The most rows of a client that the mean over a round is of."""
        return self.kl_rows

    @property
    def regroups(self) -> bool:
        """Pairs become two rows."""
        return True

    @property
    def couples_rows(self) -> str | None:
        """The mean z0 does."""
        return None if self.kl == "none" else f'set {KEY}.kl = "none"'

    @property
    def encoding(self) -> str:
        """The columns depend on no option."""
        return "unpaired/2"

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes `input_ids`, `prompt_tokens`, `good`, and for mismatched completions `tail` and `room`.

        `tail` is what of the completion was cut off, `room` how many tokens of any completion fit after the prompt. Of
        a pair the rejected side stands beside the chosen one, until `regroup`.
        """
        if format_of(rows) == UNPAIRED_PREFERENCE:
            return _encoded(rows, "completion", rows["label"].to_pylist(), tokenizer, max_length)
        good = _encoded(rows, "chosen", [True] * rows.num_rows, tokenizer, max_length)
        both = pa.concat_tables([good, _encoded(rows, "rejected", [False] * rows.num_rows, tokenizer, max_length)])
        # A pair whose chosen side is not usable keeps the other, which then stands alone.
        chosen, rejected = np.arange(rows.num_rows), np.arange(rows.num_rows) + rows.num_rows
        alone = both["input_ids"].is_null().to_numpy()[chosen]
        first = both.take(pa.array(np.where(alone, rejected, chosen)))
        second = both.take(pa.array(rejected, mask=alone))
        for name in second.column_names:
            first = first.append_column(f"{PAIRED}{name}", second[name])
        return first

    def regroup(self, rows: pa.Table, max_length: int) -> pa.Table:
        """Makes two rows of each pair, all chosen ones first, as TRL does."""
        names = [name for name in rows.column_names if not name.startswith(PAIRED)]
        if len(names) == rows.num_columns:
            return rows
        second = rows.select([f"{PAIRED}{name}" for name in names]).rename_columns(names)
        good = rows[GOOD].fill_null(False).to_numpy()
        rejected = np.where(good, np.arange(rows.num_rows) + rows.num_rows, np.arange(rows.num_rows))
        order = np.concatenate([np.flatnonzero(good), rejected])
        unpaired = pa.concat_tables([rows.select(names), second]).take(pa.array(order))
        return unpaired.filter(unpaired["input_ids"].is_valid())

    def step_rows(self, rows: pa.RecordBatch, numbers: np.ndarray) -> pa.RecordBatch:
        """Adds the `kl_ids` of each row: its prompt with the completion of the step's row before (the last is first).

        A step of one row takes the client's next row. `mismatched` is 0 if there is none.
        """
        step = rows.take(pa.array(numbers))
        if not self.means:
            return step
        others = np.roll(numbers, 1) if len(numbers) > 1 else (numbers + 1) % rows.num_rows
        other = rows.take(pa.array(others))
        prompts = zip(step["input_ids"].to_pylist(), step["prompt_tokens"].to_pylist(), strict=True)
        others_prompts = other["prompt_tokens"].to_pylist()
        completions = zip(other["input_ids"].to_pylist(), others_prompts, other["tail"].to_pylist(), strict=True)
        mixed = [
            ids[:prompt] + (others_ids[begin:] + tail)[:room]
            for (ids, prompt), (others_ids, begin, tail), room in zip(
                prompts, completions, step["room"].to_pylist(), strict=True
            )
        ]
        columns = {name: step[name] for name in step.schema.names}
        columns["kl_ids"] = pa.array(mixed, pa.list_(pa.int32()))
        columns[MISMATCHED] = pa.array((others != numbers).astype(np.int8))
        return pa.RecordBatch.from_pydict(columns)

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch of the rows, whose columns hold the mismatched sequences, padded to their own longest."""
        batch = _padded(rows, "input_ids", pad)
        columns = {GOOD: torch.from_numpy(rows[GOOD].to_numpy(zero_copy_only=False).astype(np.int64))}
        if self.means:
            mixed = _padded(rows, "kl_ids", pad)
            scored_BT = (mixed.labels_BT != IGNORED).long()
            columns |= dict(zip(KL_COLUMNS, (mixed.ids_BT, mixed.attention_BT, scored_BT), strict=True))
            columns[MISMATCHED] = torch.from_numpy(rows[MISMATCHED].to_numpy().astype(np.int64))
        return batch.plus(columns)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of rows, of good and bad ones, and of those with a mismatched completion."""
        good, rows = int(batch.columns[GOOD].sum()), batch.units
        counts = {LOSS: rows, "accuracy": rows, "chosen": good, "rejected": rows - good}
        return {**counts, **{name: int(batch.columns[MISMATCHED].sum()) for name in self.means}}

    def reference_columns(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, torch.Tensor]:
        """Returns the log-probability of each completion, and of each mismatched one."""
        columns = {REFERENCE: _scores(network, batch, context)}
        return columns | ({"kl_reference": _scores(network, _mixed(batch), context)} if self.means else {})

    def step_terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the log-ratio of each mismatched completion."""
        ratio_B = _scores(network, _mixed(batch), context)
        if self.reference != "none":
            ratio_B = ratio_B - batch.columns["kl_reference"]
        return {KL: Term(ratio_B * batch.columns[MISMATCHED], torch.arange(len(ratio_B), device=ratio_B.device))}

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the loss of each row, and what is measured; "accuracy" is the share on the right side of z0."""
        ratio_B = _scores(network, batch, context)
        if self.reference != "none":
            ratio_B = ratio_B - batch.columns[REFERENCE]
        good_B = batch.columns[GOOD] == 1
        above_B = ratio_B - batch.columns[KL].clamp(min=0) if self.means else ratio_B
        sign_B = torch.where(good_B, 1.0, -1.0).to(ratio_B.dtype)
        weight_B = torch.where(good_B, self.desirable_weight, self.undesirable_weight).to(ratio_B.dtype)
        loss_B = weight_B * (1 - torch.sigmoid(self.beta * sign_B * above_B))
        real_B, row_B = sequence_counts(batch) > 0, torch.arange(len(ratio_B), device=ratio_B.device)
        r_B = ratio_B.detach()
        values = {
            LOSS: loss_B,
            "accuracy": wins(sign_B * above_B.detach(), torch.zeros_like(r_B)),
            "chosen": torch.where(good_B, r_B, 0),
            "rejected": torch.where(good_B, 0, r_B),
            **{name: batch.columns[name] * batch.columns[MISMATCHED] for name in self.means},
        }
        return {name: Term(torch.where(real_B, value_B, 0), row_B) for name, value_B in values.items()}

    def sample(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """Returns the prompt and its completion, or that of a pair that was chosen."""
        completion = row["completion"] if "completion" in row else row["chosen"]
        if isinstance(row["prompt"], str):
            return row["prompt"], completion
        options = row.get(OPTIONS)
        turns = conversation_of(completion, options).turns
        return conversation_of(row["prompt"], options), " ".join(words(turn) for turn in turns)


def _encoded(rows: pa.Table, name: str, labels: list[bool], tokenizer: Tokenizer, max_length: int) -> pa.Table:
    types = {
        "input_ids": pa.list_(pa.int32()),
        "prompt_tokens": pa.int32(),
        GOOD: pa.bool_(),
        "tail": pa.list_(pa.int32()),
        "room": pa.int32(),
    }
    encoded = [
        (ids[:max_length], prompt, good, ids[max_length:], max_length - prompt)
        if prompt < max_length and len(ids) > max(1, prompt)
        else (None, None, None, None, None)
        for (ids, prompt), good in zip(encode_completions(rows, name, tokenizer), labels, strict=True)
    ]
    columns = zip(*encoded, strict=True)
    return pa.table({name: pa.array(column, kind) for (name, kind), column in zip(types.items(), columns, strict=True)})


def _padded(rows: pa.RecordBatch, name: str, pad: int) -> Batch:
    lengths_B = lengths(rows, name)
    starts_B = rows["prompt_tokens"].to_numpy()
    learned = np.concatenate([np.arange(n) >= start for n, start in zip(lengths_B, starts_B, strict=True)])
    return Batch.padded(flattened(rows[name]), learned, lengths_B, pad)


def _mixed(batch: Batch) -> Batch:
    """The batch of the mismatched sequences."""
    ids_BT, real_BT, scored_BT = (batch.columns[name] for name in KL_COLUMNS)
    real_BT = real_BT.clone()
    real_BT[:, 0] = 1  # a row that attends to nothing would be NaN
    return Batch.of(ids_BT, real_BT, torch.where(scored_BT == 1, ids_BT, IGNORED), int(real_BT.sum()))


def _scores(network: nn.Module, batch: Batch, context: Context) -> torch.Tensor:
    return -sequence_sums(token_losses(network, batch, every_logit=context.every_logit), batch)
