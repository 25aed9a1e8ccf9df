"""Which clients take part in a round."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np

from strategies.core.errors import require
from strategies.core.ranges import ABOVE_0, AT_LEAST_1, SHARE, Range, check_ranges
from strategies.core.seeds import rng


@dataclass(frozen=True)
class UniformCohort:
    """`size` different clients each round, every set of them equally likely."""

    kind: Literal["uniform"] = "uniform"
    size: int = 10
    varies: ClassVar[bool] = False  # whether rounds have cohorts of different sizes

    def __post_init__(self) -> None:
        require(self.size >= 1, f"cohort.size must be at least 1, not {self.size}")

    @property
    def cap(self) -> int:
        """The largest number of clients, whatever the population."""
        return self.size

    def expected(self, clients: int) -> float:
        """The number of clients that take part."""
        return float(self.size)

    def largest(self, clients: int) -> int:
        """The largest number of clients that can take part."""
        return self.size

    def sample(self, clients: int, seed: int, round_: int) -> np.ndarray:
        """Sorted ids (size,) out of `clients`, without a list of all of them; StrategyError when there are too few."""
        check_enough(clients, self.size)
        return np.sort(rng(seed, round_, -1, "cohort").choice(clients, self.size, replace=False))


@dataclass(frozen=True)
class PoissonCohort:
    """Each client by itself with probability `rate`, so that the size of a cohort varies and may be 0.

    `size`, the expected number, may be given instead of `rate`. A cohort larger than `cap` is cut to it at random. This
    is the sampling that amplifies differential privacy (see `strategies.privacy.accounting`).
    """

    kind: Literal["poisson"] = "poisson"
    rate: Annotated[float | None, Range("is each client's probability", SHARE)] = None
    size: Annotated[float | None, Range("is the expected number of clients", ABOVE_0)] = None
    cap: Annotated[int | None, Range("is the largest number of clients", AT_LEAST_1)] = None
    varies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, "cohort.")
        either = (self.rate is None) != (self.size is None)
        require(either, "a poisson cohort needs cohort.rate or cohort.size, one of them")

    def probability(self, clients: int) -> float:
        """The probability of each client; StrategyError when there are too few clients for the size."""
        if self.rate is not None:
            return self.rate
        assert self.size is not None
        check_enough(clients, self.size)
        return self.size / clients

    def expected(self, clients: int) -> float:
        """The average number of clients before the cap cuts any."""
        return self.probability(clients) * clients

    def largest(self, clients: int) -> int:
        """The largest number of clients that can take part."""
        return clients if self.cap is None else min(self.cap, clients)

    def sample(self, clients: int, seed: int, round_: int) -> np.ndarray:
        """Sorted ids out of `clients`, without a list of all: the step from one id to the next is geometric."""
        probability, generator = self.probability(clients), rng(seed, round_, -1, "cohort")
        expected = probability * clients
        batch = int(expected + 6 * math.sqrt(expected)) + 16  # nearly always enough at once
        ids, last = [np.empty(0, np.int64)], -1
        while last < clients:
            # Steps beyond the last client are cut, so that their sum cannot overflow.
            steps = np.minimum(generator.geometric(probability, batch), clients + 1)
            ids.append(last + np.cumsum(steps))
            last = int(ids[-1][-1])
        cohort = np.concatenate(ids)
        cohort = cohort[cohort < clients]
        if self.cap is not None and len(cohort) > self.cap:
            cohort = np.sort(generator.choice(cohort, self.cap, replace=False))
        return cohort


def check_enough(clients: int, size: float) -> None:
    """Raises StrategyError for a cohort of more clients than there are."""
    require(clients >= size, f"cohort.size is {size:.12g}, but only {clients} clients can train: lower cohort.size")
