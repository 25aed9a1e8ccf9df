"""The privacy that a recipe asks for: a noise multiplier or a target epsilon, and what sampling may add."""

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.errors import StrategyError, require
from strategies.privacy.accounting import Scheme, noise_multiplier

Cohort = UniformCohort | PoissonCohort


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`noise_multiplier`, or the `epsilon` that all rounds together may cost; keys of the privacy section.

    The default of `delta` is 1 / population^1.1, of clients or of all their rows. A noise multiplier of 0 clips and
    adds nothing: epsilon is infinite. `sampling` is what epsilon may count on; the meaning of "auto" depends on the
    kind. `clip` is the largest L2 norm of what one unit adds to a sum.
    """

    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    sampling: Literal["auto", "none", "poisson", "fixed"] = "auto"
    clip: float = 1.0

    def __post_init__(self) -> None:
        z = self.noise_multiplier
        least = "privacy.dp.noise_multiplier must be a number of at least 0"
        require(z is None or 0 <= z < math.inf, f"{least}, not {z}")
        target, delta = self.epsilon, self.delta
        require(target is None or 0 < target < math.inf, f"epsilon must be a number above 0, not {target}")
        require(delta is None or 0 < delta < 1, f"delta must be above 0 and below 1, not {delta}")
        if z == 0 and self.epsilon is not None:
            raise StrategyError(
                f"privacy.dp asks for epsilon {self.epsilon:g} with a noise multiplier of 0, which gives none at all: "
                f"leave noise_multiplier out, and it is computed"
            )
        either = "privacy.dp needs noise_multiplier or epsilon, one of them: the other follows from it"
        require((z is None) != (self.epsilon is None), either)
        norm = "privacy.dp.clip is the largest L2 norm and must be a number above 0"
        require(0 < self.clip < math.inf, f"{norm}, not {self.clip}")

    def normal_multiplier(self, scheme: Scheme, steps: int, delta: float) -> float:
        """z of normal noise: the key's, or the least that keeps to `epsilon`; takes seconds."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return noise_multiplier(self.epsilon, scheme, steps, delta)


@dataclass(frozen=True, kw_only=True)
class ClientBudget(Budget):
    """The keys of client-level privacy.

    `joint`: extras are clipped together with delta, as one long vector, and get the same noise; without it clients may
    send delta only.
    """

    unit: ClassVar[Literal["client"]] = "client"
    joint: bool = False


def delta_for(given: float | None, population: int, unit: str = "client") -> float:
    """The delta to use; warns above 1 / population, where to publish one whole unit would count as private."""
    delta = min(0.5, population**-1.1) if given is None else given
    if delta > 1 / population:
        warnings.warn(
            f"delta = {delta:.3g} is above 1 / {population}: to publish one {unit} at random would count as private",
            stacklevel=2,
        )
    return delta
