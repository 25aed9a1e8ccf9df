"""Bulyan over Krum: near the middle as a whole and in every coordinate (El Mhamdi et al. 2018, arXiv 1802.07927).

Legend: K clients, S selected ones, B the coordinates of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from strategies.core.protocol import Vector
from strategies.robust.krum import ranked
from strategies.robust.reading_each import ByzantineRule, by_coordinate, mean_of_rows, sorted_rows, squared_distances


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
