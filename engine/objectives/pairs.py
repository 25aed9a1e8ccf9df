"""Preference pairs: a row becomes two sequences of a batch, the chosen one first. Legend: B sequences, U pairs."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from datasets_partition.core.turns import conversation_of, words
from datasets_partition.core.types import OPTIONS, PREFERENCE
from engine.objectives.base import NATS, BaseObjective, Context, Prompt, Term, Tokenizer
from engine.objectives.completions import encode_completions
from engine.objectives.token_batch import Batch, flattened, lengths, sequence_counts, sequence_sums, token_losses

SIDES = ("input_ids", "rejected_ids")
# Columns: a completion's tokens, also those that nothing predicts; the prompt's tokens.
SIZE, PROMPT = "size", "prompt"
PAIR = "preference"  # the term of one value for each pair


class PairObjective(BaseObjective):
    """What objectives on preference pairs share: rows, batches, and figures of their rewards."""

    formats: ClassVar[tuple[str, ...]] = (PREFERENCE,)
    heldout: ClassVar[str] = PAIR
    shown: ClassVar[tuple[str, ...]] = ("accuracy",)
    figures: ClassVar[Mapping[str, float]] = {"accuracy": 1.0, "margin": NATS, "chosen": NATS, "rejected": NATS}
    units: ClassVar[Mapping[str, str]] = {
        PAIR: "per pair",
        "accuracy": "share",
        "margin": "nats",
        "chosen": "nats",
        "rejected": "nats",
    }

    @property
    def sequences(self) -> int:
        """The chosen and the rejected one."""
        return 2

    @property
    def encoding(self) -> str:
        """The columns depend on no option."""
        return "pairs"

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes the columns of `encode_pairs`."""
        return encode_pairs(rows, tokenizer, max_length)

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch of two sequences for each pair."""
        return collate_pairs(rows, pad)

    def sample(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """Returns the prompt and the chosen completion."""
        if isinstance(row["prompt"], str):
            return row["prompt"], row["chosen"]
        options = row.get(OPTIONS)
        turns = conversation_of(row["chosen"], options).turns
        return conversation_of(row["prompt"], options), " ".join(words(turn) for turn in turns)


def encode_pairs(rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
    """Makes `input_ids` of prompt and chosen completion, `rejected_ids`, and `prompt_tokens`, which both begin with.

    Sequences are cut at their end. `input_ids` is null where a side has nothing to score, or both sides are equal.
    """
    both = (encode_completions(rows, name, tokenizer) for name in ("chosen", "rejected"))
    encoded: list[tuple[list[int], list[int], int] | None] = []
    for chosen, rejected in zip(*both, strict=True):
        prompt = min(chosen.prompt_tokens, rejected.prompt_tokens)
        sides = chosen.ids[:max_length], rejected.ids[:max_length]
        scored = all(len(side) > max(1, prompt) for side in sides) and sides[0] != sides[1]
        encoded.append((*sides, prompt) if scored else None)
    columns = [[None if row is None else row[place] for row in encoded] for place in range(3)]
    types = (pa.list_(pa.int32()), pa.list_(pa.int32()), pa.int32())
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    return pa.table(dict(zip((*SIDES, "prompt_tokens"), arrays, strict=True)))


def collate_pairs(rows: pa.RecordBatch, pad: int, *, learn_prompts: bool = False) -> Batch:
    """Makes a batch of both sides of each row, next to each other, with the columns `size` and `prompt`.

    The completions are learned, and with `learn_prompts` the prompts before chosen ones too.
    """
    sides = [np.split(flattened(rows[name]), np.cumsum(lengths(rows, name))[:-1]) for name in SIDES]
    sequences = [side for pair in zip(*sides, strict=True) for side in pair]
    lengths_B, prompt_B = np.array([len(each) for each in sequences]), np.repeat(rows["prompt_tokens"].to_numpy(), 2)
    from_B = prompt_B * (np.arange(len(prompt_B)) % 2) if learn_prompts else prompt_B
    learned = np.concatenate([np.arange(n) >= start for n, start in zip(lengths_B, from_B, strict=True)])
    batch = Batch.padded(np.concatenate(sequences), learned, lengths_B, pad, group=2)
    return batch.plus(
        {SIZE: torch.from_numpy(lengths_B - prompt_B), PROMPT: torch.from_numpy(prompt_B.astype(np.int64))}
    )


class Scores(NamedTuple):
    """What a model says of a batch of pairs: the log-probability (B,) of each completion, and its tokens' nats (N,)."""

    logp_B: torch.Tensor
    nll_N: torch.Tensor

    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-probabilities (U,) of the chosen and of the rejected completions."""
        return self.logp_B[::2], self.logp_B[1::2]


def pair_scores(network: nn.Module, batch: Batch, context: Context) -> Scores:
    """Scores both sides of each pair; 0 for those that only fill a lane."""
    nll_N = token_losses(network, batch, every_logit=context.every_logit)
    return Scores(-sequence_sums(nll_N, batch), nll_N)


def pair_term(values_U: torch.Tensor, batch: Batch) -> Term:
    """Makes the term of one value for each pair, numbered by its chosen sequence; 0 for what only fills a lane."""
    row_U = torch.arange(0, len(batch.ids_BT), 2, device=values_U.device)
    return Term(torch.where(sequence_counts(batch)[::2] > 0, values_U, 0), row_U)


def reward_figures(rewards_B: torch.Tensor, batch: Batch) -> dict[str, Term]:
    """Measures the rewards (B,) of all completions: the share of chosen ones above rejected ones, ties one half."""
    chosen_U, rejected_U = rewards_B.detach()[::2], rewards_B.detach()[1::2]
    values = {"accuracy": wins(chosen_U, rejected_U), "margin": chosen_U - rejected_U}
    values |= {"chosen": chosen_U, "rejected": rejected_U}
    return {name: pair_term(values_U, batch) for name, values_U in values.items()}


def chosen_tokens(values_N: torch.Tensor, batch: Batch) -> Term:
    """Makes the term of the chosen completions' tokens."""
    chosen_N = batch.row_N % 2 == 0
    return Term(values_N[chosen_N], batch.row_N[chosen_N])


def chosen_count(batch: Batch) -> int:
    """Returns the number of the chosen completions' tokens."""
    return int((batch.row_N % 2 == 0).sum())


def wins(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Returns 1 where a number is larger than the other, 1/2 where they are equal, 0 elsewhere."""
    return (ours > theirs).double() * 0.5 + (ours >= theirs).double() * 0.5
