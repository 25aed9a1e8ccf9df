"""Preference pairs: a row becomes two sequences of a batch, the chosen one first. Legend: B sequences, U pairs."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from engine.objectives.base import Context, Term, Tokenizer
from engine.objectives.completions import encode_completions
from engine.objectives.token_batch import Batch, flattened, lengths, sequence_counts, sequence_sums, token_losses

SIDES = ("input_ids", "rejected_ids")
SIZE = "size"  # the column of a completion's tokens, also those that nothing predicts


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


def collate_pairs(rows: pa.RecordBatch, pad: int) -> Batch:
    """Makes a batch of both sides of each row, next to each other, with the column `size`."""
    sides = [np.split(flattened(rows[name]), np.cumsum(lengths(rows, name))[:-1]) for name in SIDES]
    sequences = [side for pair in zip(*sides, strict=True) for side in pair]
    lengths_B, prompt_B = np.array([len(each) for each in sequences]), np.repeat(rows["prompt_tokens"].to_numpy(), 2)
    learned = np.concatenate([np.arange(n) >= start for n, start in zip(lengths_B, prompt_B, strict=True)])
    batch = Batch.padded(np.concatenate(sequences), learned, lengths_B, pad, group=2)
    return batch.plus({SIZE: torch.from_numpy(lengths_B - prompt_B)})


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


def chosen_tokens(values_N: torch.Tensor, batch: Batch) -> Term:
    """Makes the term of the chosen completions' tokens; a rejected one's count 0."""
    return Term(torch.where(batch.row_N % 2 == 0, values_N, 0), batch.row_N)


def chosen_count(batch: Batch) -> int:
    """Returns the number of the chosen completions' tokens."""
    return int((batch.row_N % 2 == 0).sum())


def wins(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Returns 1 where a number is larger than the other, 1/2 where they are equal, 0 elsewhere."""
    return (ours > theirs).double() * 0.5 + (ours >= theirs).double() * 0.5
