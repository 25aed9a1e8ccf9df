"""Adaptive clipping: the norm that a share of the clients stays within, itself private (Andrew et al. 2021).

"Differentially Private Learning with Adaptive Clipping", arXiv 1905.03871, algorithm 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.errors import StrategyError, require
from strategies.core.protocol import Aggregate, Mask, Update
from strategies.privacy.budget import Cohort
from strategies.privacy.central import CentralDp, CentralPlan, bounded, with_noise
from strategies.privacy.noise_source import Words

WITHIN = "dp.within"  # the name of the sum of 1[norm <= clip] - 1/2
LARGEST_STEP = 20.0  # of the norm's logarithm in one round, whatever the noise


@dataclass(frozen=True, kw_only=True)
class AdaptiveDp(CentralDp):
    """clip <- clip exp(-rate (b - quantile)), b the noisy share of clients with |update| <= clip; `clip` is the first.

    Each client sends 1[norm <= clip] - 1/2 beside its update, and the sum gets noise of `quantile_noise`, by
    default a twentieth of the expected cohort. In return the update's noise grows to
    z_delta = (z^-2 - (2 quantile_noise)^-2)^(-1/2), so that both sums together cost as much as one with z (theorem 1).
    """

    kind: Literal["adaptive"] = "adaptive"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    clip: float = 0.1
    quantile: float = 0.5
    rate: float = 0.2
    quantile_noise: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = "privacy.dp.quantile is a share of the clients, above 0 and below 1"
        require(0 < self.quantile < 1, f"{share}, not {self.quantile}")
        for name in ("rate", "quantile_noise"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"privacy.dp.{name} must be a number above 0, not {value}")

    def plan(self, cohort: Cohort, clients: int, rounds: int) -> "AdaptivePlan":
        """As for fixed clipping; StrategyError where the quantile's noise alone costs more than z allows."""
        plan = super().plan(cohort, clients, rounds)
        noise = plan.divisor / 20 if self.quantile_noise is None else self.quantile_noise
        if plan.noise_multiplier >= 2 * noise:
            raise StrategyError(
                f"a noise multiplier of {plan.noise_multiplier:.4g} leaves nothing for the clipping norm's own noise "
                f"of {noise:.4g}, which must be above half of it: raise cohort.size or privacy.dp.quantile_noise, or "
                f'set privacy.dp.kind = "central"'
            )
        return AdaptivePlan(**vars(plan), quantile=self.quantile, rate=self.rate, quantile_noise=noise)


@dataclass(frozen=True)
class AdaptivePlan(CentralPlan):
    """A plan of fixed clipping, and how the norm follows the updates."""

    beside: ClassVar[Mapping[str, int]] = {WITHIN: 1}
    quantile: float
    rate: float
    quantile_noise: float

    @property
    def update_noise(self) -> float:
        """z_delta."""
        z = self.noise_multiplier
        return z / math.sqrt(1 - (z / (2 * self.quantile_noise)) ** 2)

    def encode(self, update: Update, clip: float, whole_norm: Callable[[float], float] = float) -> Update:
        """The clipped update, and as one more sum whether it had to be clipped."""
        update, norm = bounded(update, clip, self.joint, whole_norm)
        within = torch.tensor([0.5 if norm <= clip else -0.5])
        return replace(update, extras=update.extras | {WITHIN: within})

    def decode(
        self, aggregate: Aggregate, clip: float, words: Words, live: Mapping[str, Mask] | None = None
    ) -> tuple[Aggregate, float]:
        """The noisy sums without the quantile's, and the next clipping norm."""
        noise = self.quantile_noise if self.noise_multiplier else 0.0
        within = with_noise(aggregate.extras[WITHIN], noise, words).item()
        share = 0.5 + within / self.divisor
        step = -self.rate * (share - self.quantile)
        rest = {name: extra for name, extra in aggregate.extras.items() if name != WITHIN}
        noisy = self._noisy(replace(aggregate, extras=rest), self.update_noise * clip, words, live or {})
        return noisy, clip * math.exp(max(-LARGEST_STEP, min(LARGEST_STEP, step)))
