"""What workers are asked to do, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Unit = tuple[int, ...]  # clients that train together, or one client


@dataclass(frozen=True)
class Place:
    """Where a slot runs: its Ray node, and the GPU that it shares (None on CPU)."""

    node_id: str
    gpu: str | None


@dataclass(frozen=True)
class Work:
    """A round's clients (N,), the steps that each takes (N,), and the seconds that it is thought to take (N,)."""

    clients: np.ndarray
    steps: np.ndarray
    costs: np.ndarray

    def of(self, some: np.ndarray) -> Work:
        """The same of some of the clients: a mask (N,)."""
        return Work(self.clients[some], self.steps[some], self.costs[some])

    def cost(self, unit: Unit) -> float:
        """How long a unit is thought to take."""
        return sum(self._each[client] for client in unit)

    @cached_property
    def _each(self) -> dict[int, float]:
        return dict(zip(self.clients.tolist(), self.costs.tolist(), strict=True))


def halves(pack: Unit) -> list[Unit]:
    """A pack of two clients or more as two packs."""
    return [pack[: len(pack) // 2], pack[len(pack) // 2 :]]
