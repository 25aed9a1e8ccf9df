"""The median and the trimmed mean of each coordinate (Yin et al. 2018, arXiv 1803.01498, algorithm 1).

Legend: K clients, B the coordinates of a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.protocol import Vector
from strategies.core.ranges import Bounds, Range
from strategies.robust.reading_each import RobustRule, by_coordinate, mean_of_rows, sorted_rows

BELOW_HALF: Bounds = ("at least 0 and below 0.5", lambda x: 0 <= x < 0.5)


@dataclass(frozen=True)
class Median(RobustRule):
    """theta += lr * median_k delta_k, coordinate by coordinate; of an even number, the mean of the middle two.

    Definition 1, option I. Reads each update. Holds while fewer than half of the cohort lie. Traps: on skewed data a
    coordinate that few clients move is not moved at all; with one or two clients it is the mean.
    """

    kind: Literal["median"] = "median"
    elementwise: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1803.01498"

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The median of every coordinate."""
        return by_coordinate(deltas, lambda x_KB: middle(x_KB, (len(x_KB) - 1) // 2))


@dataclass(frozen=True)
class TrimmedMean(RobustRule):
    """theta += lr * the mean of every coordinate without its smallest and its largest values, floor(trim K) of each.

    Definition 2, option II. Reads each update. Holds while at most the share `trim` of the cohort lies. Where
    floor(trim K) is 0 it would be the plain mean, which is refused unless trim is 0.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Range("is the share cut on each side", BELOW_HALF)] = 0.2
    elementwise: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1803.01498"

    def cut(self, count: int) -> int:
        """The number of values cut on each side of `count` values, safe from the rounding of trim K."""
        return min(math.floor(self.trim * count + 1e-9), (count - 1) // 2)

    def smallest_cohort(self) -> int:
        """The smallest number of updates of which some are cut."""
        if self.trim == 0:
            return 1
        count = max(3, math.floor(1 / self.trim))
        return count if self.cut(count) else count + 1

    def way_out(self, count: int) -> str:
        """The share that cuts one on each side."""
        return f"set strategy.trim to at least 1/{count}" if count > 2 else super().way_out(count)

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The trimmed mean of every coordinate."""
        return by_coordinate(deltas, lambda x_KB: middle(x_KB, self.cut(len(x_KB))))


def middle(x_KB: torch.Tensor, cut: int) -> torch.Tensor:
    """The mean over K without the `cut` smallest and the `cut` largest values."""
    return mean_of_rows(sorted_rows(x_KB)[cut : len(x_KB) - cut])
