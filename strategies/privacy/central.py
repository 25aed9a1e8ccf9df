"""Central differential privacy: the server adds normal noise to the sum (McMahan et al. 2018, arXiv 1710.06963).

Clients clip; the holder of the sum draws the noise and divides by a constant. Whoever sees the sum before the noise
sees it unprotected. Adaptive clipping lets the norm follow the updates (Andrew et al. 2021, "Differentially Private
Learning with Adaptive Clipping", arXiv 1905.03871, algorithm 1). Legend: P parameters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.errors import require
from strategies.core.protocol import Aggregate, Mask, Update, Vector, with_frozen, without_frozen
from strategies.core.ranges import ABOVE_0, INSIDE, Range
from strategies.privacy.accounting import Epsilon, Gaussian, Sampling, Scheme, spent
from strategies.privacy.budget import ClientBudget, Cohort, Norm, delta_for
from strategies.privacy.noise import Words, normal

Decoded = tuple[Aggregate, float]  # the noisy sums, and the next round's clipping norm
WholeNorm = Callable[[float], float]  # as in `Broadcast`
BLOCK = 2**20  # numbers of noise at a time
MARGIN = 2.0**-22  # float32 rounds each product up by less: the clipped norm is at most the bound, not about it


@dataclass(frozen=True, kw_only=True)
class ServerNoise(ClientBudget):
    """What the kinds of central noise share: clients clip, the server adds the noise to the sum."""

    adds_to: ClassVar[Literal["sum"]] = "sum"

    def claims(self, cohort: Cohort) -> Sampling:
        """The sampling that epsilon counts on."""
        if self.sampling == "auto":
            return "poisson" if cohort.kind == "poisson" else "none"
        return self.sampling

    def scheme(self, cohort: Cohort, clients: int) -> Scheme:
        """The sampling scheme of the cohort; StrategyError for one whose epsilon would be false."""
        sampling = self.claims(cohort)
        size = (
            'privacy.dp.sampling is "poisson", but the cohort has a fixed size, where a Poisson epsilon would be false'
        )
        drawn = sampling != "poisson" or cohort.kind == "poisson"
        require(drawn, f'{size}: set cohort.kind = "poisson", or sampling = "fixed" or "none"')
        varies = 'privacy.dp.sampling is "fixed", but a Poisson cohort has no fixed size: set it to "poisson" or "none"'
        require(sampling != "fixed" or cohort.kind != "poisson", varies)
        if sampling == "none":
            return Scheme()
        cap = cohort.cap if cohort.kind == "poisson" else None
        return Scheme(sampling, cohort.expected(clients) / clients, clients, cap)

    def plan(self, cohort: Cohort, clients: int, rounds: int) -> "CentralPlan":
        """The noise of all rounds with cohorts of this population; takes seconds where z follows from epsilon."""
        scheme, delta = self.scheme(cohort, clients), delta_for(self.delta, clients)
        z = self.normal_multiplier(scheme, rounds, delta)
        return CentralPlan(z, self.clip, cohort.expected(clients), scheme, delta, self.joint)


@dataclass(frozen=True, kw_only=True)
class CentralDp(ServerNoise):
    """sum_k w_k clip(delta_k) + N(0, z^2 clip^2), over the expected number of clients in place of the sum of weights.

    The divisor is a constant, or it would tell how many took part. With weights below 1 this shortens the steps, for
    which a larger server learning rate makes up. `sampling` "auto": epsilon counts on Poisson cohorts alone.
    """

    kind: Literal["central"] = "central"


@dataclass(frozen=True)
class CentralPlan:
    """Noise that the server adds to the sum, for the unit of a client; `clip` is the first clipping norm.

    `beside` are lengths of the sums that it needs beside the rule's, by name; their coordinates are at most 1/2.
    """

    adds_to: ClassVar[Literal["sum"]] = "sum"
    beside: ClassVar[Mapping[str, int]] = {}
    noise_multiplier: float
    clip: float
    divisor: float
    scheme: Scheme
    delta: float
    joint: bool

    def encode(self, update: Update, clip: float, whole_norm: WholeNorm = float) -> Update:
        """The client's half, after all transforms: its part in the sums; `whole_norm` is that of `Broadcast`."""
        return bounded(update, clip, self.joint, whole_norm)[0]

    def decode(self, aggregate: Aggregate, clip: float, words: Words, sent_masks: Mapping[str, Mask]) -> Decoded:
        """The noisy sums as if of `divisor` clients, and the next round's clipping norm; before transforms decode.

        Call it once for each round, whether clients took part or not. Coordinates outside of `sent_masks` get no noise.
        """
        return self._noisy(aggregate, self.noise_multiplier * clip, words, sent_masks), clip

    def spent(self, rounds: int, *, simulated: bool) -> Epsilon:
        """The epsilon that `rounds` rounds cost a client."""
        return spent(Gaussian(self.noise_multiplier), self.scheme, rounds, self.delta, "client", simulated=simulated)

    def _noisy(self, aggregate: Aggregate, deviation: float, words: Words, sent_masks: Mapping[str, Mask]) -> Aggregate:
        sums = {"delta": aggregate.total} | {name: aggregate.extras[name] for name in sorted(aggregate.extras)}
        sums = {name: with_noise(x, deviation, words) for name, x in without_frozen(sums, sent_masks).items()}
        extras = with_frozen(sums, sent_masks)
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


def bounded(update: Update, clip: float, joint: bool, whole_norm: WholeNorm = float) -> tuple[Update, float]:
    """The update with |(delta, extras)| <= clip, and the norm that it had before.

    `whole_norm` is that of `Broadcast`, since the update may be a shard. With a weight from 0 to 1 the client moves the
    sums of weight * delta and of extras by at most `clip`, together. StrategyError for extras that are not clipped and
    for other weights: a cut weight would not cut the extras that the rule built with it. ValueError for NaN or inf.
    """
    sender, vectors = f"client {update.client}", [update.delta, *update.extras.values()]
    require(joint or not update.extras, f"{sender} sends {sorted(update.extras)} beside its delta, which nothing clips")
    require(0 <= update.weight <= 1, f"{sender} has the weight {update.weight}, and clipping needs one from 0 to 1")
    norm = whole_norm(math.hypot(*(float(torch.linalg.vector_norm(vector, dtype=torch.float64)) for vector in vectors)))
    if not math.isfinite(norm):
        raise ValueError(f"the update of {sender} holds NaN or infinity")
    if norm <= clip:
        return update, norm
    factor = clip / norm * (1 - MARGIN)
    extras = {name: extra * factor for name, extra in update.extras.items()}
    return replace(update, delta=update.delta * factor, extras=extras), norm


WITHIN = "dp.within"  # the name of the sum of 1[norm <= clip] - 1/2
LARGEST_STEP = 20.0  # of the norm's logarithm in one round, whatever the noise


@dataclass(frozen=True, kw_only=True)
class AdaptiveDp(ServerNoise):
    """clip <- clip exp(-rate (b - quantile)), b the noisy share of clients with |update| <= clip; `clip` is the first.

    Each client sends 1[norm <= clip] - 1/2 beside its update, and the sum gets noise of `quantile_noise`, by
    default a twentieth of the expected cohort. In return the update's noise grows to
    z_delta = (z^-2 - (2 quantile_noise)^-2)^(-1/2), so that both sums together cost as much as one with z (theorem 1).
    """

    kind: Literal["adaptive"] = "adaptive"
    clip: Norm = 0.1
    quantile: Annotated[float, Range("is a share of the clients", INSIDE)] = 0.5
    rate: Annotated[float, Range("is how fast the clipping norm moves", ABOVE_0)] = 0.2
    quantile_noise: Annotated[float | None, Range("is the noise of that share's sum", ABOVE_0)] = None

    def plan(self, cohort: Cohort, clients: int, rounds: int) -> "AdaptivePlan":
        """As for fixed clipping; StrategyError where the quantile's noise alone costs more than z allows."""
        plan = super().plan(cohort, clients, rounds)
        noise = plan.divisor / 20 if self.quantile_noise is None else self.quantile_noise
        nothing = f"a noise multiplier of {plan.noise_multiplier:.4g} leaves nothing for the clipping norm's own noise"
        mend = 'raise cohort.size or privacy.dp.quantile_noise, or set privacy.dp.kind = "central"'
        enough = plan.noise_multiplier < 2 * noise
        require(enough, f"{nothing} of {noise:.4g}, which must be above half of it: {mend}")
        return AdaptivePlan(**vars(plan), quantile=self.quantile, rate=self.rate, quantile_noise=noise)


@dataclass(frozen=True)
class AdaptivePlan(CentralPlan):
    """As `CentralPlan`, the server's noise on the sum for the unit of a client; the norm follows the updates."""

    beside: ClassVar[Mapping[str, int]] = {WITHIN: 1}
    quantile: float
    rate: float
    quantile_noise: float

    @property
    def update_noise(self) -> float:
        """z_delta."""
        z = self.noise_multiplier
        return z / math.sqrt(1 - (z / (2 * self.quantile_noise)) ** 2)

    def encode(self, update: Update, clip: float, whole_norm: WholeNorm = float) -> Update:
        """The clipped update, and as one more sum whether it had to be clipped."""
        update, norm = bounded(update, clip, self.joint, whole_norm)
        within = torch.tensor([0.5 if norm <= clip else -0.5])
        return replace(update, extras=update.extras | {WITHIN: within})

    def decode(self, aggregate: Aggregate, clip: float, words: Words, sent_masks: Mapping[str, Mask]) -> Decoded:
        """The noisy sums without the quantile's, and the next clipping norm."""
        noise = self.quantile_noise if self.noise_multiplier else 0.0
        within = with_noise(aggregate.extras[WITHIN], noise, words).item()
        share = 0.5 + within / self.divisor
        step = -self.rate * (share - self.quantile)
        rest = {name: extra for name, extra in aggregate.extras.items() if name != WITHIN}
        noisy = self._noisy(replace(aggregate, extras=rest), self.update_noise * clip, words, sent_masks)
        return noisy, clip * math.exp(max(-LARGEST_STEP, min(LARGEST_STEP, step)))
