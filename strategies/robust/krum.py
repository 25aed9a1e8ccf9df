"""Krum and Multi-Krum: the updates with the closest neighbors (Blanchard et al. 2017, arXiv 1703.02757, section 4).

Bulyan over Krum: near the middle as a whole and in every coordinate (El Mhamdi et al. 2018, arXiv 1802.07927). Legend:
K clients, S selected ones, B the coordinates of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.protocol import Vector
from strategies.core.ranges import AT_LEAST_1, Range
from strategies.robust.reading_each import ByzantineRule, by_coordinate, mean_of_rows, sorted_rows, squared_distances


@dataclass(frozen=True)
class Krum(ByzantineRule):
    """theta += lr * delta_i with the smallest score: the sum of |delta_i - delta_j|^2 over its K - f - 2 nearest j.

    Reads each update. Needs K >= 2f + 3. Of equal scores the client of the smaller number wins. Trap: on skewed data it
    follows one client in the middle and ignores what the others learned; Multi-Krum is milder.
    """

    kind: Literal["krum"] = "krum"
    paper: ClassVar[str] = "arXiv 1703.02757"

    def smallest_cohort(self) -> int:
        """2f + 3: the paper's 2f + 2 < K."""
        return 2 * self.f + 3

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The update with the smallest score."""
        return deltas[ranked(squared_distances(deltas), self.f)[0]]


@dataclass(frozen=True)
class MultiKrum(ByzantineRule):
    """theta += lr * the mean of the `m` updates with Krum's smallest scores: m = 1 is Krum, m = K the plain mean.

    Reads each update. Needs K >= 2f + 3 and K >= m; the default of m is K - f - 2, the number of neighbors in a score.
    Trap: above K - f the mean includes liars for sure.
    """

    kind: Literal["multi_krum"] = "multi_krum"
    m: Annotated[int | None, Range("is the number of updates that are averaged", AT_LEAST_1)] = None
    paper: ClassVar[str] = "arXiv 1703.02757"

    def smallest_cohort(self) -> int:
        """Krum's, or m if that is more."""
        return max(2 * self.f + 3, self.m or 1)

    def way_out(self, count: int) -> str:
        """A smaller m where only m is too large."""
        if self.m is not None and 2 * self.f + 3 <= count:
            return f"set strategy.m to at most {count}"
        return super().way_out(count)

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The mean of the m updates with the smallest scores, in the order of clients."""
        best = ranked(squared_distances(deltas), self.f)[: self.m or len(deltas) - self.f - 2]
        return by_coordinate([deltas[client] for client in sorted(best)], mean_of_rows)


@dataclass(frozen=True)
class Bulyan(ByzantineRule):
    """theta += lr * in each coordinate, the mean of the S - 2f values nearest to the median of S = K - 2f updates.

    Krum selects the S updates one by one. Reads each update. Needs K >= 4f + 3. The median is one of the values, of an
    even S the lower middle one (the paper leaves it open); of two values equally near the lower is taken. Krum runs
    again on the rest after each selection; its number of neighbors, then K - f - 2 of a smaller K, is kept at one or
    more. The authors' later code averages several updates at each selection and selects two fewer; this is the paper's
    rule.
    """

    kind: Literal["bulyan"] = "bulyan"
    paper: ClassVar[str] = "arXiv 1802.07927"

    def smallest_cohort(self) -> int:
        """4f + 3, as the paper demands."""
        return 4 * self.f + 3

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The selection, then the mean around the median."""
        squares_KK, left, selected = squared_distances(deltas), list(range(len(deltas))), list[int]()
        while len(selected) < len(deltas) - 2 * self.f:
            selected.append(left.pop(ranked(squares_KK[left][:, left], self.f)[0]))
        return by_coordinate([deltas[client] for client in sorted(selected)], self.around_median)

    def around_median(self, x_SB: torch.Tensor) -> torch.Tensor:
        """The mean of the S - 2f values of each coordinate that are nearest to its median."""
        sorted_SB = sorted_rows(x_SB)
        median_B = sorted_SB[(len(x_SB) - 1) // 2]
        order_SB = (sorted_SB.double() - median_B).abs().argsort(dim=0, stable=True)
        return mean_of_rows(sorted_SB.gather(0, order_SB[: len(x_SB) - 2 * self.f]))


def ranked(squares_KK: torch.Tensor, f: int) -> list[int]:
    """The rows in the order of Krum's scores, best first; a score sums K - f - 2 neighbors, at least one."""
    neighbors = max(1, len(squares_KK) - f - 2)
    nearest_KK = squares_KK.clone().fill_diagonal_(torch.inf).sort(dim=1).values  # without the distance to itself
    scores = nearest_KK[:, :neighbors].sum(dim=1).tolist()
    return sorted(range(len(scores)), key=scores.__getitem__)
