"""Central differential privacy: the server adds normal noise to the sum (McMahan et al. 2018, arXiv 1710.06963).

Clients clip; the holder of the sum draws the noise and divides by a constant. Whoever sees the sum before the noise
sees it unprotected. Legend: P parameters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from strategies.core.errors import StrategyError
from strategies.core.live import with_frozen, without_frozen
from strategies.core.protocol import Aggregate, Mask, Update, Vector
from strategies.privacy.accounting import Epsilon, Gaussian, Sampling, Scheme, noise_multiplier, spent
from strategies.privacy.budget import Budget, Cohort, delta_for, scheme_for
from strategies.privacy.clipping import Contribution, bounded
from strategies.privacy.noise_source import Words, normal

BLOCK = 2**20  # numbers of noise at a time


@dataclass(frozen=True, kw_only=True)
class CentralDp(Contribution, Budget):
    """sum_k w_k clip(delta_k) + N(0, z^2 clip^2), over the expected number of clients in place of the sum of weights.

    The divisor is a constant, or it would tell how many took part. With weights below 1 this shortens the steps, for
    which a larger server learning rate makes up. `sampling` "auto": epsilon counts on Poisson cohorts alone.
    """

    kind: Literal["central"] = "central"
    clip: float = 1.0

    def __post_init__(self) -> None:
        Budget.__post_init__(self)
        if not 0 < self.clip < math.inf:
            raise StrategyError(f"privacy.dp.clip is the largest L2 norm and must be a number above 0, not {self.clip}")

    def plan(self, cohort: Cohort, clients: int, rounds: int) -> "CentralPlan":
        """The noise of so many rounds with cohorts of this population; takes seconds where z follows from epsilon."""
        auto: Sampling = "poisson" if cohort.kind == "poisson" else "none"
        scheme = scheme_for(cohort, clients, auto if self.sampling == "auto" else self.sampling)
        delta = delta_for(self.delta, clients)
        z = self.noise_multiplier
        if z is None:
            assert self.epsilon is not None
            z = noise_multiplier(self.epsilon, scheme, rounds, delta)
        return CentralPlan(z, self.clip, cohort.expected(clients), scheme, delta, self.joint)


@dataclass(frozen=True)
class CentralPlan:
    """z, the first clipping norm, the divisor, and the scheme under which epsilon is true."""

    noise_multiplier: float
    clip: float
    divisor: float
    scheme: Scheme
    delta: float
    joint: bool

    def encode(self, update: Update, clip: float, whole_norm: Callable[[float], float] = float) -> Update:
        """The client's half, after all transforms: its part in the sums; `whole_norm` is that of `Broadcast`."""
        return bounded(update, clip, self.joint, whole_norm)[0]

    def decode(
        self, aggregate: Aggregate, clip: float, words: Words, live: Mapping[str, Mask] | None = None
    ) -> tuple[Aggregate, float]:
        """The noisy sums as if of `divisor` clients, and the next round's clipping norm; before transforms decode.

        Call it once for each round, whether clients took part or not. `live` is the strategy's: frozen coordinates get
        no noise.
        """
        return self._noisy(aggregate, self.noise_multiplier * clip, words, live or {}), clip

    def spent(self, rounds: int, *, simulated: bool) -> Epsilon:
        """The epsilon of so many rounds for a client."""
        return spent(Gaussian(self.noise_multiplier), self.scheme, rounds, self.delta, "client", simulated=simulated)

    def _noisy(self, aggregate: Aggregate, deviation: float, words: Words, live: Mapping[str, Mask]) -> Aggregate:
        sums = {"delta": aggregate.total} | {name: aggregate.extras[name] for name in sorted(aggregate.extras)}
        sums = {name: with_noise(x, deviation, words) for name, x in without_frozen(sums, live).items()}
        extras = with_frozen(sums, live)
        total = extras.pop("delta")
        # The number of clients is as private as what they sent.
        return replace(aggregate, weight=self.divisor, total=total, extras=extras, count=max(1, round(self.divisor)))


def with_noise(x_P: Vector, deviation: float, words: Words) -> Vector:
    """The vector plus independent normal noise."""
    if deviation == 0:
        return x_P
    noisy_P = x_P.clone()
    for start in range(0, x_P.numel(), BLOCK):
        block = noisy_P[start : start + BLOCK]
        noise = torch.from_numpy(normal(words, block.numel())) * deviation
        block.copy_(block.double() + noise)
    return noisy_P
