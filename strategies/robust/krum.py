"""Krum and Multi-Krum: the updates with the closest neighbors (Blanchard et al. 2017, arXiv 1703.02757, section 4).

Legend: K clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from strategies.core.errors import require
from strategies.core.protocol import Vector
from strategies.robust.reading_each import ByzantineRule, by_coordinate, mean_of_rows, squared_distances


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
    m: int | None = None
    paper: ClassVar[str] = "arXiv 1703.02757"

    def __post_init__(self) -> None:
        super().__post_init__()
        averaged = "strategy.m is the number of updates that are averaged and must be at least 1"
        require(self.m is None or self.m >= 1, f"{averaged}, not {self.m}")

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


def ranked(squares_KK: torch.Tensor, f: int) -> list[int]:
    """The rows in the order of Krum's scores, best first; a score sums K - f - 2 neighbors, at least one."""
    neighbors = max(1, len(squares_KK) - f - 2)
    nearest_KK = squares_KK.clone().fill_diagonal_(torch.inf).sort(dim=1).values  # without the distance to itself
    scores = nearest_KK[:, :neighbors].sum(dim=1).tolist()
    return sorted(range(len(scores)), key=scores.__getitem__)
