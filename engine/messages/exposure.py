"""What the base's owner sees of clients, where it alone has the base. Legend: C candidates, P numbers of a prompt."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Usage:
    """The tokens that a call made the provider read and write, and their price (NaN: not given)."""

    read: int
    written: int
    cost: float


@dataclass(frozen=True)
class Exposure:
    """What a call showed of a client: `kind` of message, its rows by number, how often each, and the usage.

    `nbytes` are those of the message: token ids of 4 bytes, and vectors of float32.
    """

    kind: str
    rows: tuple[int, ...]
    times: int
    usage: Usage
    nbytes: int


@dataclass(frozen=True)
class PromptSizes:
    """What PEFT's configuration of a prompt says of the base: layers, heads of keys and values, their width, width.

    `tokens` is the number of tokens if the prompt is in words, else 0.
    """

    layers: int
    heads: int
    head_width: int
    width: int
    attention_heads: int
    tokens: int
    is_prefix: bool


@dataclass(frozen=True)
class PlugIn:
    """What the base's owner gives a client that trains ends: a handle to itself, and the tokenizer's files."""

    owner: Any
    tokenizer: dict[str, bytes]


@dataclass(frozen=True)
class Opening:
    """What the base's owner tells a client at the start: the first prompt (P,), the pad token, sizes, the tokenizer.

    `spread` is the standard deviation of the embeddings' numbers.
    """

    start_P: np.ndarray
    shape: tuple[int, ...]
    spread: float
    pad: int
    sizes: PromptSizes
    tokenizer: dict[str, bytes]


@dataclass(frozen=True)
class Scores:
    """Losses (C,), float64, summed over the rows of a call, and the number of units in each."""

    losses_C: np.ndarray
    units: int
    usage: Usage


@dataclass(frozen=True)
class PromptGradient:
    """The gradient (P,) of a step's loss with respect to a prompt, and each term's sum and number of units."""

    gradient_P: np.ndarray
    totals: dict[str, float]
    counts: dict[str, int]
    tokens: int
    usage: Usage


@dataclass(frozen=True)
class Texts:
    """Token ids that the base wrote behind each prompt."""

    ids: list[list[int]]
    usage: Usage
