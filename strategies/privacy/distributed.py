"""Distributed differential privacy: each client adds a part of the noise, in whole numbers, before secure aggregation.

Kairouz et al. 2021 (arXiv 2102.06387) and Agarwal et al. 2021 (arXiv 2110.04995): clip, rotate, scale, round, add
noise. The server sees noisy sums only. Legend: P parameters, D = 2^m >= P.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch

from strategies.core.errors import require
from strategies.core.protocol import Aggregate, Update
from strategies.privacy.accounting import Epsilon, RingNoise, Scheme, least_noise, spent
from strategies.privacy.budget import ClientBudget, Cohort, delta_for
from strategies.privacy.central import bounded
from strategies.privacy.integers import Ring, fit, inflated, largest_l1, rotate, rotate_back, rounded
from strategies.privacy.noise import DiscreteGaussianSum, SkellamSum, Words, discrete_gaussian, skellam

NoiseKind = Literal["skellam", "discrete_gaussian"]


@dataclass(frozen=True, kw_only=True)
class DistributedDp(ClientBudget):
    """sum_k round(w_k clip(delta_k) s) + noise_k: the noise that arrives is at least that of z clip.

    At least the share `survivors` of the expected cohort must arrive, or the round is aborted; the share `corrupt` may
    omit its noise. Each of the rest adds z clip / sqrt(survivors - corrupt). No sampling is claimed.
    """

    kind: Literal["distributed"] = "distributed"
    adds_to: ClassVar[Literal["ring"]] = "ring"
    noise: NoiseKind = "skellam"
    survivors: float = 0.8
    corrupt: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        seen = "secure aggregation tells the server who takes part, and how many came to a round without a sum"
        claims = self.sampling in ("poisson", "fixed")
        require(not claims, f'{seen}, so that no sampling hides anything: set privacy.dp.sampling = "none"')
        none = 'distributed noise of 0 is none: set privacy.dp.kind = "none" and keep privacy.secagg'
        require(self.noise_multiplier != 0, none)
        shares = "privacy.dp.survivors and .corrupt are shares of the cohort, 0 <= corrupt < survivors <= 1"
        fit_together = 0 <= self.corrupt < self.survivors <= 1
        require(fit_together, f"{shares}, not {self.corrupt} and {self.survivors}")

    def plan(self, cohort: Cohort, clients: int, rounds: int, length: int, bits: int = 32) -> "DistributedPlan":
        """The noise for sums of `length` numbers, extras included; StrategyError where the ring is too small."""
        expected = cohort.expected(clients)
        cap = math.ceil(expected + 6 * math.sqrt(expected))
        require(cohort.cap is not None, f"a ring must know its largest cohort: set cohort.cap, such as to {cap}")
        return _planned(self, cohort, clients, rounds, length, bits, delta_for(self.delta, clients))

    def at(self, z: float, cohort: Cohort, clients: int, length: int, bits: int) -> tuple[Ring, RingNoise, int]:
        """The ring, its noise's divergences, and the least number of survivors for a noise multiplier."""
        expected = cohort.expected(clients)
        least = math.ceil(self.survivors * expected - 1e-9)
        honest = least - math.floor(self.corrupt * expected + 1e-9)
        none = f"of {least} survivors none is honest: expect fewer corrupt clients, or larger cohorts"
        require(honest >= 1, none)
        ring = fit(cohort.largest(clients), honest, self.clip, z, length, bits)
        norm = inflated(self.clip * ring.scale, ring.dimension)
        if self.noise == "skellam":
            return ring, SkellamSum(honest * ring.deviation**2, norm, largest_l1(norm, ring.dimension)), least
        return ring, DiscreteGaussianSum(honest, ring.deviation, norm, ring.dimension), least


@dataclass(frozen=True)
class DistributedPlan:
    """Noise of which each client adds a part in the ring, for the unit of a client.

    Fewer than `least` survivors bring too little noise: their sum must not be unmasked.
    """

    adds_to: ClassVar[Literal["ring"]] = "ring"
    scheme: ClassVar[Scheme] = Scheme()
    noise_multiplier: float
    clip: float
    divisor: float
    least: int
    ring: Ring
    noise: RingNoise
    kind: NoiseKind
    delta: float
    joint: bool
    length: int

    def encode(self, update: Update, signs_D: np.ndarray, words: Words) -> np.ndarray:
        """The client's half, after all transforms: its noisy whole numbers (D,) int64, not yet modulo 2^b."""
        update, _ = bounded(update, self.clip, self.joint)
        vectors = [update.delta * update.weight, *(update.extras[name] for name in sorted(update.extras))]
        x_P = torch.cat(vectors).double().numpy()
        if len(x_P) != self.length:
            raise ValueError(f"the sums have {self.length} numbers, and client {update.client} sends {len(x_P)}")
        y_D = rotate(x_P * self.ring.scale, signs_D)
        q_D = rounded(y_D, inflated(self.clip * self.ring.scale, self.ring.dimension), words)
        if self.kind == "skellam":
            q_D += skellam(words, len(q_D), float(self.ring.deviation**2))
        else:
            q_D += discrete_gaussian(words, len(q_D), self.ring.deviation)
        return q_D

    def decode(self, total_D: np.ndarray, survivors: int, extras: Mapping[str, int], signs_D: np.ndarray) -> Aggregate:
        """The noisy sums as if of `divisor` clients, from the sum as signed numbers; `extras` are lengths by name."""
        less = f"{survivors} clients' noise is less than epsilon counts on, which is that of {self.least}"
        require(survivors >= self.least, f"{less}: the round is void")
        x_P = torch.from_numpy(rotate_back(total_D / self.ring.scale, signs_D, self.length)).float()
        names = sorted(extras)
        delta_P, *rest = x_P.split([self.length - sum(extras.values()), *(extras[name] for name in names)])
        sums = dict(zip(names, rest, strict=True))
        return Aggregate(self.divisor, delta_P, sums, max(1, round(self.divisor)))

    def spent(self, rounds: int, *, simulated: bool) -> Epsilon:
        """The epsilon that `rounds` rounds cost a client; rounds without it need not count."""
        return spent(self.noise, self.scheme, rounds, self.delta, "client", simulated=simulated)


@lru_cache(maxsize=64)
def _planned(
    dp: DistributedDp, cohort: Cohort, clients: int, rounds: int, length: int, bits: int, delta: float
) -> DistributedPlan:
    def epsilon(z: float) -> float:
        ring, noise, _ = dp.at(z, cohort, clients, length, bits)
        return spent(noise, Scheme(), rounds, delta, "client", simulated=True).epsilon if ring.deviation else math.inf

    z = dp.noise_multiplier
    if z is None:
        assert dp.epsilon is not None
        z = least_noise(epsilon, dp.epsilon)
    ring, noise, least = dp.at(z, cohort, clients, length, bits)
    small = f"a ring of {bits} bits is too small for {ring.clients} clients with a noise multiplier of {z:.4g}"
    require(ring.deviation > 0, f"{small}: take more bits, fewer clients, or more noise")
    expected = cohort.expected(clients)
    return DistributedPlan(z, dp.clip, expected, least, ring, noise, dp.noise, delta, dp.joint, length)
