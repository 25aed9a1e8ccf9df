"""The coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, definition 2 and algorithm 1, option II)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.core.protocol import Vector
from strategies.robust.reading_each import Robust, by_coordinate, mean_of_rows, sorted_rows


@dataclass(frozen=True)
class TrimmedMean(Robust):
    """theta += lr * the mean of what is left of every coordinate without its `trim` smallest and largest shares.

    Of K updates floor(trim K) are cut on each side. Reads each update; no state. Holds while at most the share `trim`
    of the cohort lies. Where floor(trim K) is 0 it would be the plain mean, which is refused unless trim is 0.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"  # type: ignore[assignment]  # the union's tag differs by design
    trim: float = 0.2
    elementwise: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1803.01498"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trim < 0.5:
            raise ValueError(
                f"strategy.trim is the share cut on each side and must be at least 0 and below 0.5, not {self.trim}"
            )

    def cut(self, came: int) -> int:
        """How many of so many updates are cut on each side: what rounding takes from trim K is given back."""
        return min(math.floor(self.trim * came + 1e-9), (came - 1) // 2)

    def smallest_cohort(self) -> int:
        """From how many updates on there is something to cut."""
        if self.trim == 0:
            return 1
        came = max(3, math.floor(1 / self.trim))
        return came if self.cut(came) else came + 1

    def way_out(self, came: int) -> str:
        """The share that cuts one on each side."""
        return f"set strategy.trim to at least 1/{came}" if came > 2 else super().way_out(came)

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The trimmed mean of every coordinate."""
        cut = self.cut(len(deltas))
        return by_coordinate(deltas, lambda x_KB: mean_of_rows(sorted_rows(x_KB)[cut : len(deltas) - cut]))
