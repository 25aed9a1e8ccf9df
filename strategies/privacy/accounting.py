"""The privacy cost of noisy sums: (epsilon, delta), together with everything that the number rests on.

`dp-accounting` does the numbers: privacy loss distributions for Poisson samples of Gaussian sums, Rényi differential
privacy (RDP; Mironov 2017, arXiv 1702.07476) for the rest. z is the noise multiplier: the noise's standard deviation
over the largest norm of what one unit adds to the sum.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from strategies.core.errors import require

Unit = Literal["client", "example"]
Sampling = Literal["none", "poisson", "fixed"]
Relation = Literal["zero out one", "add or remove one", "replace one"]
Accountant = Literal["exact", "PLD", "RDP"]

RELATIONS: dict[Sampling, Relation] = {"none": "zero out one", "poisson": "add or remove one", "fixed": "replace one"}
DRAWN = dict(none="without amplification", poisson="Poisson sampling", fixed="fixed-size sampling without replacement")
SHARE = 5e-4  # of epsilon: about what the grid of the privacy loss may add to it
FINEST = 1e-4  # grid of the privacy loss: below it, a second and more for one epsilon
LEAST, MOST = 1e-3, 1e6  # noise multipliers that are tried
CLOSE = 1e-4  # of the noise multiplier: a search ends here
# Rényi orders: whole numbers, for which all bounds in use are proved.
ORDERS: np.ndarray = np.array([*range(2, 65), *range(68, 129, 4), *range(144, 257, 16)])


@dataclass(frozen=True)
class Scheme:
    """How the units of a sum are drawn from `population`: each by itself with `rate`, or round(rate * population).

    "none": epsilon does not count on sampling, so that it holds also against those who know who takes part. The other
    two hold only against those who do not. `cap`: a larger Poisson sample is cut to that size at random.
    """

    sampling: Sampling = "none"
    rate: float = 1.0
    population: int = 0
    cap: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.rate <= 1, f"a sampling rate is above 0 and at most 1, not {self.rate}")
        sized = self.sampling == "fixed" or self.cap is not None
        require(not sized or self.population >= 1, "samples of fixed or capped size need to know the population")


@dataclass(frozen=True)
class Epsilon:
    """What `steps` noisy sums cost one unit, and the reading under which it is true.

    `relation` is the difference between two neighboring populations. `simulated`: the noise came from a seed, so that
    whoever knows the seed can remove it; the number is what fresh noise would have given.
    """

    epsilon: float
    delta: float
    unit: Unit
    sampling: Sampling
    relation: Relation
    accountant: Accountant
    steps: int
    simulated: bool

    def __str__(self) -> str:
        label = ", simulated" if self.simulated else ""
        cost = f"epsilon {self.epsilon:.4g} at delta {self.delta:.3g} for one {self.unit} ({self.relation})"
        return f"{cost}, {DRAWN[self.sampling]}, {self.steps} steps, {self.accountant}{label}"


class Noise(ABC):
    """The noise of one sum; hashable, like everything that an epsilon depends on."""

    @abstractmethod
    def cost(self, scheme: Scheme, steps: int, delta: float) -> tuple[float, Accountant]:
        """The epsilon of `steps` sums, and how it was computed."""


@dataclass(frozen=True)
class Gaussian(Noise):
    """Normal noise of `multiplier` times the largest norm."""

    multiplier: float

    def cost(self, scheme: Scheme, steps: int, delta: float) -> tuple[float, Accountant]:
        """Exact without sampling, by privacy loss distributions for Poisson samples, by RDP for fixed ones."""
        z = self.multiplier
        if z == 0:
            return math.inf, "exact"
        if scheme.sampling == "fixed":
            return _of_fixed(z, scheme, steps, delta), "RDP"
        # A rate of 1 is no sampling, and has a closed form; with a cap, somebody may still be left out.
        if scheme.sampling == "none" or (scheme.rate == 1 and scheme.cap is None):
            from dp_accounting import get_epsilon_gaussian

            # Balle and Wang 2018 (arXiv 1805.06530), theorem 8: many normal sums are one with less noise.
            return float(get_epsilon_gaussian(z / math.sqrt(steps), delta)), "exact"
        return _of_poisson(z, scheme, steps, delta), "PLD"


class RingNoise(Noise):
    """Noise of whole numbers that several clients add."""

    @abstractmethod
    def rdp(self, orders: np.ndarray) -> np.ndarray:
        """The Rényi divergence of the noisy sums with and without one unit, at whole orders above 1."""

    def cost(self, scheme: Scheme, steps: int, delta: float) -> tuple[float, Accountant]:
        """By RDP; no sampling is claimed, since secure aggregation tells the server who takes part."""
        from dp_accounting.rdp import compute_epsilon

        assert scheme.sampling == "none"
        return float(compute_epsilon(ORDERS, steps * self.rdp(ORDERS), delta)[0]), "RDP"


@lru_cache(maxsize=4096)
def spent(noise: Noise, scheme: Scheme, steps: int, delta: float, unit: Unit, *, simulated: bool) -> Epsilon:
    """What the steps cost. `steps` counts the sums that one unit may be in: without sampling, its own rounds.

    Whatever is released beside the noisy sums (losses, who takes part) is not covered.
    """
    value, accountant = noise.cost(scheme, steps, delta) if steps else (0.0, "exact")
    return Epsilon(value, delta, unit, scheme.sampling, RELATIONS[scheme.sampling], accountant, steps, simulated)


@lru_cache(maxsize=256)
def noise_multiplier(target: float, scheme: Scheme, steps: int, delta: float) -> float:
    """The least z of normal noise, to a share of 10^-4, with which the steps cost at most the target epsilon."""
    return least_noise(lambda z: Gaussian(z).cost(scheme, steps, delta)[0] if steps else 0.0, target)


def least_noise(epsilon: Callable[[float], float], target: float) -> float:
    """The least z with epsilon(z) <= target, to a share of 10^-4 and never below it, by bisection of its logarithm."""
    high = 1.0
    while epsilon(high) > target:
        high *= 2
        none = f"no noise multiplier up to {MOST:g} gives epsilon {target}: allow more, or fewer rounds"
        require(high <= MOST, none)
    low = high / 2
    while epsilon(low) <= target:
        low, high = low / 2, low
        if low < LEAST:
            return high
    while high / low > 1 + CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon(middle) <= target else (middle, high)
    return high


# dp-accounting takes a second to import, so only a call that needs an epsilon imports it.


def _of_poisson(z: float, scheme: Scheme, steps: int, delta: float) -> float:
    """Privacy loss distributions (Doroshenko et al. 2022, arXiv 2207.04380): an upper bound however coarse the grid."""
    loss = _poisson_loss(z, scheme, 1 << steps.bit_length(), delta)
    return float(loss.self_compose(steps).get_epsilon_for_delta(delta))


@lru_cache(maxsize=2)
def _poisson_loss(z: float, scheme: Scheme, most: int, delta: float) -> Any:
    """The privacy loss of one step on a grid for up to `most` of them: a run asks for a new one when they double."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import privacy_loss_distribution as pld
    from dp_accounting.rdp import RdpAccountant

    event = PoissonSampledDpEvent(scheme.rate, GaussianDpEvent(z))
    rough = float(RdpAccountant(ORDERS).compose(event, most // 2).get_epsilon(delta))
    grid = max(FINEST, math.sqrt(SHARE * rough / most))  # which adds about its square for each step
    if scheme.cap is None:
        return pld.from_gaussian_mechanism(z, value_discretization_interval=grid, sampling_prob=scheme.rate)
    drawn = scheme.population, scheme.rate, scheme.cap
    return pld.from_truncated_subsampled_gaussian_mechanism(*drawn, z, value_discretization_interval=grid)


def _of_fixed(z: float, scheme: Scheme, steps: int, delta: float) -> float:
    """Wang et al. 2019 (arXiv 1808.00087), theorem 27; one unit in another's place moves the sum by twice the norm."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    size = round(scheme.rate * scheme.population)
    event = SampledWithoutReplacementDpEvent(scheme.population, size, GaussianDpEvent(z / 2))
    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_ONE)
    return float(accountant.compose(event, steps).get_epsilon(delta))
