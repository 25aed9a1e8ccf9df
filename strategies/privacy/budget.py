"""The privacy that a recipe asks for: a noise multiplier or a target epsilon, and what sampling may add."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.errors import StrategyError
from strategies.privacy.accounting import Sampling, Scheme, check_delta, check_target

Cohort = UniformCohort | PoissonCohort


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`noise_multiplier`, or the `epsilon` that all rounds together may cost; keys of the privacy section.

    The default of `delta` is 1 / population^1.1, of clients or of all their rows. A noise multiplier of 0 clips and
    adds nothing: epsilon is infinite.
    `sampling` is what epsilon may count on; the meaning of "auto" depends on the kind.
    """

    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    sampling: Literal["auto", "none", "poisson", "fixed"] = "auto"

    def __post_init__(self) -> None:
        z = self.noise_multiplier
        if z is not None and not 0 <= z < math.inf:
            raise StrategyError(f"privacy.dp.noise_multiplier must be a number of at least 0, not {z}")
        if self.epsilon is not None:
            check_target(self.epsilon)
        if self.delta is not None:
            check_delta(self.delta)
        if z == 0 and self.epsilon is not None:
            raise StrategyError(
                f"privacy.dp asks for epsilon {self.epsilon:g} with a noise multiplier of 0, which gives none at all: "
                f"leave noise_multiplier out, and it is computed"
            )
        if (z is None) == (self.epsilon is None):
            raise StrategyError("privacy.dp needs noise_multiplier or epsilon, one of them: the other follows from it")


def delta_for(given: float | None, population: int, unit: str = "client") -> float:
    """The delta to use; warns above 1 / population, where to publish one whole unit would count as private."""
    delta = min(0.5, population**-1.1) if given is None else given
    if delta > 1 / population:
        warnings.warn(
            f"delta = {delta:.3g} is above 1 / {population}: to publish one {unit} at random would count as private",
            stacklevel=2,
        )
    return delta


def scheme_for(cohort: Cohort, clients: int, sampling: Sampling) -> Scheme:
    """The sampling scheme of the cohort; StrategyError for one whose epsilon would be false."""
    poisson = isinstance(cohort, PoissonCohort)
    if sampling == "poisson" and not poisson:
        raise StrategyError(
            'privacy.dp.sampling is "poisson", but the cohort has a fixed size, for which a Poisson epsilon would be '
            'false: set cohort.kind = "poisson", or sampling = "fixed" or "none"'
        )
    if sampling == "fixed" and poisson:
        raise StrategyError(
            'privacy.dp.sampling is "fixed", but a Poisson cohort has no fixed size: set it to "poisson" or "none"'
        )
    if sampling == "none":
        return Scheme()
    cap = cohort.cap if isinstance(cohort, PoissonCohort) else None
    return Scheme(sampling, cohort.expected(clients) / clients, clients, cap)
