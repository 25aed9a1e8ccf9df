"""Example-level privacy inside a client: what DP-SGD costs one row (Abadi et al. 2016, arXiv 1607.00133).

This is only the accounting: the client itself clips each row's gradient and adds the noise.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.core.errors import StrategyError
from strategies.privacy.accounting import Epsilon, Gaussian, Scheme, spent
from strategies.privacy.budget import Budget, delta_for


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
        if self.sampling == "fixed":
            raise StrategyError('privacy.dp.sampling "fixed" is not for rows: draw Poisson batches, or claim "none"')

    def plan(self, fewest_rows: int, all_rows: int, batch: int, steps: int) -> "ExamplePlan":
        """The noise for `steps` local steps of `batch` rows on average, over all rounds that a client may be in.

        The client with the fewest rows has `fewest_rows`, and all clients together have `all_rows`.
        """
        if fewest_rows < 1 or batch < 1:
            raise StrategyError(f"clients need rows and batches need size, not {fewest_rows} and {batch}")
        scheme = Scheme() if self.sampling == "none" else Scheme("poisson", min(1.0, batch / fewest_rows))
        delta = delta_for(self.delta, all_rows, "row")
        return ExamplePlan(self.normal_multiplier(scheme, steps, delta), self.clip, scheme, delta)


@dataclass(frozen=True)
class ExamplePlan:
    """z, the gradients' clipping norm, and the scheme under which epsilon is true."""

    adds_to: ClassVar[Literal["gradients"]] = "gradients"
    noise_multiplier: float
    clip: float
    scheme: Scheme
    delta: float

    def spent(self, steps: int, *, simulated: bool) -> Epsilon:
        """The epsilon of so many local steps for a row of the client with the fewest rows; others' rows cost less."""
        return spent(Gaussian(self.noise_multiplier), self.scheme, steps, self.delta, "example", simulated=simulated)
