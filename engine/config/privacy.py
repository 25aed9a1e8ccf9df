"""The privacy section of a recipe: what the server may see, and how little sums may say about one client or row."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.messages.checks import at_least, below_one
from engine.messages.errors import RunError
from strategies.core.base import Rule
from strategies.core.errors import StrategyError
from strategies.privacy.budget import ExampleDp
from strategies.privacy.central import AdaptiveDp, CentralDp
from strategies.privacy.distributed import DistributedDp
from strategies.secagg.parameters import Parameters, choose
from strategies.secagg.ring import Sum, Sums


@dataclass(frozen=True, kw_only=True)
class SecAgg:
    """Secure aggregation (SecAgg+): the server learns only sums. "full" runs it, "ideal" gives its bits without masks.

    Values are integers in a ring of 2^`bits`: coordinates of the update are clipped to +-`bound`, and sums beside the
    update to `bounds`, by name. The graph tolerates the shares `corrupt` and `dropout` of the cohort, and with
    `semi_malicious` a server that lies about who dropped out; `neighbors` and `threshold` set k and t by hand.
    `active` signs keys and survivors, which holds against a server that lies about anything. Coordinates from fewer
    than `min_contributors` clients are not summed. A dead slot voids the session, whose clients train again, or its
    clients count as "dropout". More than `max_aborts` rounds without a result end the run.
    """

    mode: Literal["off", "ideal", "full"] = "off"
    bound: float = 1.0
    bounds: dict[str, float] = field(default_factory=dict)
    bits: int = 32
    corrupt: float = 0.05
    dropout: float = 0.05
    semi_malicious: bool = False
    neighbors: int | None = None
    threshold: int | None = None
    active: bool = False
    min_contributors: int = 2
    on_slot_death: Literal["void", "dropout"] = "void"
    max_aborts: int = 3

    def __post_init__(self) -> None:
        below_one("privacy.secagg", corrupt=self.corrupt, dropout=self.dropout)
        at_least("privacy.secagg", 2, min_contributors=self.min_contributors)
        at_least("privacy.secagg", 0, max_aborts=self.max_aborts)
        for name, value in {"bound": self.bound, **self.bounds}.items():
            if not 0 < value < float("inf"):
                raise RunError(f"privacy.secagg's bounds are numbers above 0, but {name} is {value}")

    def parameters(self, clients: int) -> Parameters:
        """k and t for a cohort of this size; RunError if no graph tolerates what is asked."""
        try:
            if self.neighbors is None:
                chosen = choose(clients, self.corrupt, self.dropout, self.semi_malicious, self.active)
                return chosen if self.threshold is None else replace(chosen, threshold=self.threshold)
            threshold = self.neighbors // 2 + 1 if self.threshold is None else self.threshold
            return Parameters(clients, self.neighbors, threshold, self.active)
        except StrategyError as error:
            raise RunError(f"privacy.secagg: {error}") from None

    def sums(self, sums: tuple[Sum, ...], clients: int) -> Sums:
        """The sums in the ring; RunError where it is too small for the cohort."""
        try:
            return Sums(sums, clients, self.bits)
        except StrategyError as error:
            raise RunError(f"privacy.secagg: {error}") from None


@dataclass(frozen=True)
class NoDp:
    """No differential privacy."""

    kind: Literal["none"] = "none"
    unit: ClassVar[None] = None
    adds_to: ClassVar[None] = None


Dp = NoDp | CentralDp | AdaptiveDp | DistributedDp | ExampleDp


@dataclass(frozen=True)
class Privacy:
    """Secure aggregation and differential privacy, and the weights that go with them.

    `rows_cap` R is a public number of rows; a client's rows above it do not count. Rules that weigh clients by rows
    need it under secure aggregation and client-level noise, where a weight is min(rows, R) / R: a divisor that follows
    the cohort, as without privacy, would tell each client how many rows others have.
    """

    secagg: SecAgg = field(default_factory=SecAgg)
    dp: Annotated[Dp, Field(discriminator="kind")] = field(default_factory=NoDp)
    rows_cap: int | None = None

    def __post_init__(self) -> None:
        at_least("privacy", 1, rows_cap=self.rows_cap)

    @property
    def on(self) -> bool:
        """Whether there is secure aggregation or differential privacy."""
        return self.secure or self.dp.unit is not None

    @property
    def secure(self) -> bool:
        """Whether sums go through secure aggregation."""
        return self.secagg.mode != "off"

    @property
    def simulated(self) -> bool:
        """Whether noise comes from the recipe's seed, so that its epsilon holds only for fresh noise in its place."""
        return self.secagg.mode != "full"

    @property
    def public_weights(self) -> bool:
        """Whether a client's weight may depend only on its own rows and on what everybody knows."""
        return self.secure or self.dp.unit == "client"

    def full_rows(self, cohort_rows: np.ndarray, largest: int) -> float:
        """The number of rows that has the weight 1 in a round; NaN where weights are public and do not ask for it.

        The population's largest client has `largest` rows. The result is `largest` (or the cap) over the power of two
        that gives the cohort's largest client a weight above 1/2: the exact sum's grid has a fixed step, and a huge
        client elsewhere must not make it coarse. A power of two changes means by the grid's rounding alone.
        """
        if self.public_weights:
            return math.nan
        full = self.rows_cap or largest
        most = min(full, int(cohort_rows.max(initial=1)))
        return math.ldexp(full, 1 - (full // most).bit_length())

    def weight(self, rows: int, full_rows: float) -> float:
        """A client's weight, from 0 to 1, before its strategy sees it; `full_rows` is the round's.

        1 under privacy without `rows_cap`, where only rules that weigh all clients alike are accepted.
        """
        if self.public_weights:
            return min(rows, self.rows_cap) / self.rows_cap if self.rows_cap else 1.0
        return min(rows, self.rows_cap or rows) / full_rows

    def describe_weights(self, strategy: Rule) -> str:
        """Where the clients' weights come from, for the statement of epsilon."""
        if strategy.weighs_alike:
            return "weight 1 for each client"
        if self.rows_cap is None:
            return "weights that may follow numbers of rows, which are outside of epsilon"
        return f"weights min(rows, {self.rows_cap}) / {self.rows_cap}"
