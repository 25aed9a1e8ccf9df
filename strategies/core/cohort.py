"""Which clients take part in a round."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from strategies.core.seeds import rng


@dataclass(frozen=True)
class UniformCohort:
    """`size` different clients each round, every set of them equally likely."""

    kind: Literal["uniform"] = "uniform"
    size: int = 10

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"cohort.size must be at least 1, not {self.size}")

    def expected(self, clients: int) -> float:
        """How many take part."""
        return float(self.size)

    def largest(self, clients: int) -> int:
        """How many take part at most."""
        return self.size

    def sample(self, clients: int, seed: int, round_: int) -> np.ndarray:
        """Sorted ids (size,) of 0 to `clients` - 1, never listing all; ValueError when there are too few."""
        if clients < self.size:
            raise ValueError(f"cohort.size is {self.size}, but only {clients} clients can train: lower cohort.size")
        return np.sort(rng(seed, round_, -1, "cohort").choice(clients, self.size, replace=False))


@dataclass(frozen=True)
class PoissonCohort:
    """Each client by itself with probability `rate`, so that a cohort's size varies and may be 0.

    Instead of `rate`, `size` may say how many are expected. `cap`: a larger cohort is cut to so many, at random. This
    is the sampling that differential privacy gains from (see `accounting`).
    """

    kind: Literal["poisson"] = "poisson"
    rate: float | None = None
    size: float | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.size is None):
            raise ValueError("a poisson cohort needs cohort.rate or cohort.size, one of them")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"cohort.rate must be above 0 and at most 1, not {self.rate}")
        if self.size is not None and not 0 < self.size < math.inf:
            raise ValueError(f"cohort.size is how many clients are expected and must be above 0, not {self.size}")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cohort.cap must be at least 1, not {self.cap}")

    def probability(self, clients: int) -> float:
        """Each client's; ValueError when there are too few clients for the size."""
        if self.rate is not None:
            return self.rate
        assert self.size is not None
        if clients < self.size:
            raise ValueError(f"cohort.size is {self.size:g}, but only {clients} clients can train: lower cohort.size")
        return self.size / clients

    def expected(self, clients: int) -> float:
        """How many take part on average, not counting what the cap cuts."""
        return self.probability(clients) * clients

    def largest(self, clients: int) -> int:
        """How many take part at most."""
        return clients if self.cap is None else min(self.cap, clients)

    def sample(self, clients: int, seed: int, round_: int) -> np.ndarray:
        """Sorted ids of 0 to `clients` - 1: from one to the next it is a geometric step, so that nobody is listed."""
        probability, generator = self.probability(clients), rng(seed, round_, -1, "cohort")
        expected = probability * clients
        batch = int(expected + 6 * math.sqrt(expected)) + 16  # nearly always enough at once
        ids, last = [np.empty(0, np.int64)], -1
        while last < clients:
            # A step beyond the last client is as good as any: no sum of them wraps.
            steps = np.minimum(generator.geometric(probability, batch), clients + 1)
            ids.append(last + np.cumsum(steps))
            last = int(ids[-1][-1])
        cohort = np.concatenate(ids)
        cohort = cohort[cohort < clients]
        if self.cap is not None and len(cohort) > self.cap:
            cohort = np.sort(generator.choice(cohort, self.cap, replace=False))
        return cohort
