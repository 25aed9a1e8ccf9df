"""What an objective asks of a trainer that samples completions for it, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: `samples` for each prompt, of at most `tokens` tokens.

    A temperature of 0 takes the likeliest token each time. The prompts of `steps` steps are completed at once.
    """

    samples: int = 1
    tokens: int = 16
    temperature: float = 1.0
    steps: int = 1


class Completion(NamedTuple):
    """A sampled completion: its token ids, with the end token if it has `ended`, and their log-probabilities."""

    ids: np.ndarray
    logprobs: np.ndarray
    ended: bool


Completions = Sequence[Completion]  # of several prompts, the samples of a prompt one after another
