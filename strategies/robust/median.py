"""The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, definition 1 and algorithm 1, option I)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from strategies.core.protocol import Vector
from strategies.robust.reading_each import RobustRule, by_coordinate, mean_of_rows, sorted_rows


@dataclass(frozen=True)
class Median(RobustRule):
    """theta += lr * median_k delta_k, coordinate by coordinate; of an even number, the mean of the middle two.

    Reads each update. Holds while fewer than half of the cohort lie. Traps: on skewed data a coordinate that few
    clients move is not moved at all; with one or two clients it is the mean.
    """

    kind: Literal["median"] = "median"
    elementwise: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1803.01498"

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The median of every coordinate."""
        return by_coordinate(deltas, middle)


def middle(x_KB: torch.Tensor) -> torch.Tensor:
    """The median over K, of an even K the mean of the middle two."""
    sorted_KB = sorted_rows(x_KB)
    return mean_of_rows(sorted_KB[(len(x_KB) - 1) // 2 : len(x_KB) // 2 + 1])
