"""The privacy that a recipe asks for: a noise multiplier or a target epsilon, and what sampling may add.

Example-level privacy is this alone, what DP-SGD costs one row (Abadi et al. 2016, arXiv 1607.00133): the client itself
clips each row's gradient and adds the noise.
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.errors import require
from strategies.core.ranges import ABOVE_0, INSIDE, Range, check_ranges
from strategies.privacy.accounting import Epsilon, Gaussian, Scheme, noise_multiplier, spent

Cohort = UniformCohort | PoissonCohort
Norm = Annotated[float, Range("is the largest L2 norm", ABOVE_0)]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`noise_multiplier`, or the `epsilon` that all rounds together may cost; keys of the privacy section.

    The default of `delta` is 1 / population^1.1, of clients or of all their rows. A noise multiplier of 0 clips and
    adds nothing: epsilon is infinite. `sampling` is what epsilon may count on; the meaning of "auto" depends on the
    kind. `clip` is the largest L2 norm of what one unit adds to a sum.
    """

    noise_multiplier: Annotated[float | None, Range("is the noise over the largest norm")] = None
    epsilon: Annotated[float | None, Range("is what all rounds together may cost", ABOVE_0)] = None
    delta: Annotated[float | None, Range("is the chance that epsilon does not hold", INSIDE)] = None
    sampling: Literal["auto", "none", "poisson", "fixed"] = "auto"
    clip: Norm = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, "privacy.dp.")
        z, target = self.noise_multiplier, self.epsilon
        none = f"privacy.dp asks for epsilon {target} with a noise multiplier of 0, which gives none at all"
        require(z != 0 or target is None, f"{none}: leave noise_multiplier out, and it is computed")
        either = "privacy.dp needs noise_multiplier or epsilon, one of them: the other follows from it"
        require((z is None) != (target is None), either)

    def normal_multiplier(self, scheme: Scheme, steps: int, delta: float) -> float:
        """z of normal noise: the key's, or the least that keeps to `epsilon`; takes seconds."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return noise_multiplier(self.epsilon, scheme, steps, delta)


@dataclass(frozen=True, kw_only=True)
class ClientBudget(Budget):
    """The keys of client-level privacy.

    `joint`: extras are clipped with delta, as one vector, and get the same noise; without it clients send delta alone.
    """

    unit: ClassVar[Literal["client"]] = "client"
    joint: bool = False


def delta_for(given: float | None, population: int, unit: str = "client") -> float:
    """The delta to use; warns above 1 / population, where to publish one whole unit would count as private."""
    delta = min(0.5, population**-1.1) if given is None else given
    if delta > 1 / population:
        above = f"delta = {delta:.3g} is above 1 / {population}"
        warnings.warn(f"{above}: to publish one {unit} at random would count as private", stacklevel=2)
    return delta


@dataclass(frozen=True, kw_only=True)
class ExampleDp(Budget):
    """Each step: the sum of the rows' gradients, each clipped to `clip`, plus noise of z clip.

    The unit is a row of one client: whoever sees every update and every model learns little about any row, and may
    learn much about the client. The noise suits the client with the fewest rows, whose rows are drawn most often.
    Delta is for the rows of all clients: the default is 1 / rows^1.1, and a warning names one above 1 / rows.
    `sampling` "auto" means Poisson batches, "none" batches in any other order.
    """

    kind: Literal["example"] = "example"
    unit: ClassVar[Literal["example"]] = "example"
    adds_to: ClassVar[Literal["gradients"]] = "gradients"

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = 'privacy.dp.sampling "fixed" is not for rows: draw Poisson batches, or claim "none"'
        require(self.sampling != "fixed", fixed)

    def plan(self, fewest_rows: int, all_rows: int, batch: int, steps: int) -> "ExamplePlan":
        """The noise for `steps` local steps of `batch` rows on average, over all rounds that a client may be in.

        The client with the fewest rows has `fewest_rows`, and all clients together have `all_rows`.
        """
        some = fewest_rows >= 1 and batch >= 1
        require(some, f"clients need rows and batches need size, not {fewest_rows} and {batch}")
        scheme = Scheme() if self.sampling == "none" else Scheme("poisson", min(1.0, batch / fewest_rows))
        delta = delta_for(self.delta, all_rows, "row")
        return ExamplePlan(self.normal_multiplier(scheme, steps, delta), self.clip, scheme, delta)


@dataclass(frozen=True)
class ExamplePlan:
    """Noise that each local step adds to the sum of clipped gradients, for the unit of a row."""

    adds_to: ClassVar[Literal["gradients"]] = "gradients"
    noise_multiplier: float
    clip: float
    scheme: Scheme
    delta: float

    def spent(self, steps: int, *, simulated: bool) -> Epsilon:
        """The epsilon of `steps` local steps for a row of the client with the fewest rows; others' rows cost less."""
        return spent(Gaussian(self.noise_multiplier), self.scheme, steps, self.delta, "example", simulated=simulated)
