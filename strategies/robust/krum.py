"""Krum and Multi-Krum: the updates with the closest neighbours (Blanchard et al. 2017, arXiv 1703.02757, section 4).

Legend: K clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from strategies.core.protocol import Vector
from strategies.robust.reading_each import Byzantine, by_coordinate, mean_of_rows, squared_distances


@dataclass(frozen=True)
class Krum(Byzantine):
    """theta += lr * delta_i with the smallest score: the sum of |delta_i - delta_j|^2 over its K - f - 2 nearest j.

    Reads each update; no state. Needs K >= 2f + 3. Of equal scores the client of the smaller number wins. On skewed
    data it follows one client in the middle and leaves the others' knowledge out; Multi-Krum is milder.
    """

    kind: Literal["krum"] = "krum"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    paper: ClassVar[str] = "arXiv 1703.02757"

    def smallest_cohort(self) -> int:
        """2f + 3: the paper's 2f + 2 < K."""
        return 2 * self.f + 3

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The best scored update."""
        return deltas[ranked(squared_distances(deltas), self.f)[0]]


@dataclass(frozen=True)
class MultiKrum(Byzantine):
    """theta += lr * the mean of the `m` updates with Krum's smallest scores: m = 1 is Krum, m = K the plain mean.

    Reads each update; no state. Needs K >= 2f + 3 and K >= m; without `m` it is K - f - 2, as many as a score counts.
    Above K - f it takes liars in for sure.
    """

    kind: Literal["multi_krum"] = "multi_krum"  # type: ignore[assignment]  # the union's tag differs by design
    m: int | None = None
    paper: ClassVar[str] = "arXiv 1703.02757"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m is not None and self.m < 1:
            raise ValueError(f"strategy.m is how many updates are averaged and must be at least 1, not {self.m}")

    def smallest_cohort(self) -> int:
        """Krum's, or m if that is more."""
        return max(2 * self.f + 3, self.m or 1)

    def way_out(self, came: int) -> str:
        """A smaller m where that is what is wrong."""
        if self.m is not None and 2 * self.f + 3 <= came:
            return f"set strategy.m to at most {came}"
        return super().way_out(came)

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The mean of the m best scored updates, in the order of clients."""
        best = ranked(squared_distances(deltas), self.f)[: self.m or len(deltas) - self.f - 2]
        return by_coordinate([deltas[client] for client in sorted(best)], mean_of_rows)


def ranked(squares_KK: torch.Tensor, f: int) -> list[int]:
    """The rows in the order of Krum's scores, the best first; a score counts K - f - 2 neighbours, at least one."""
    neighbours = max(1, len(squares_KK) - f - 2)
    nearest_KK = squares_KK.clone().fill_diagonal_(torch.inf).sort(dim=1).values  # without the distance to itself
    scores = nearest_KK[:, :neighbours].sum(dim=1).tolist()
    return sorted(range(len(scores)), key=scores.__getitem__)
