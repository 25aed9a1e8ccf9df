"""What an objective asks of a trainer that samples completions for it, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: `samples` for each prompt, of at most `tokens` tokens.

    The prompts of `steps` steps are completed at once. Of the rows a `share` is completed, drawn one by one.
    """

    samples: int = 1
    tokens: int = 16
    temperature: float = 1.0
    steps: int = 1
    share: float = 1.0


class Completion(NamedTuple):
    """A sampled completion: its token ids, with the end token if it has `ended`, and their log-probabilities."""

    ids: np.ndarray
    logprobs: np.ndarray
    ended: bool


Completions = Sequence[Completion]  # of several prompts, the samples of a prompt one after another


class Answers(NamedTuple):
    """Completed rows of held-out prompts: of each a sample, and beside it the likeliest tokens.

    `referred` are the reference model's by the same random numbers, and `kl_B` the log-ratios of the samples to it;
    None without such a model.
    """

    given: pa.RecordBatch
    referred: pa.RecordBatch | None = None
    kl_B: torch.Tensor | None = None
