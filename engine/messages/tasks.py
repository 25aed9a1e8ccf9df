"""What workers are asked to do, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Unit = tuple[int, ...]  # clients that train together in lanes, or one client


@dataclass(frozen=True)
class Place:
    """Where a worker's process runs: its Ray node, and its GPU (None on the CPU)."""

    node_id: str
    gpu: str | None


@dataclass(frozen=True)
class Work:
    """A round's clients (N,), the number of steps of each (N,), and the expected cost of each in seconds (N,)."""

    clients: np.ndarray
    steps: np.ndarray
    costs: np.ndarray

    def of(self, chosen: np.ndarray) -> Work:
        """Returns the work of the clients in a mask (N,)."""
        return Work(self.clients[chosen], self.steps[chosen], self.costs[chosen])

    def cost(self, unit: Unit) -> float:
        """Returns the expected cost of a unit, in seconds."""
        return sum(self._cost_by_client[client] for client in unit)

    @cached_property
    def _cost_by_client(self) -> dict[int, float]:
        return dict(zip(self.clients.tolist(), self.costs.tolist(), strict=True))


def halves(unit: Unit) -> list[Unit]:
    """Splits a unit of two clients or more into two."""
    return [unit[: len(unit) // 2], unit[len(unit) // 2 :]]
