"""The privacy section of a recipe: what the server may not see, and what goes with it; importable without ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from engine.messages.checks import at_least, below_one
from strategies.core.cohort import UniformCohort
from strategies.core.protocol import NO_LAYOUT, Strategy
from strategies.lora.hetlora import HetLora
from strategies.personalized.local_only import LocalOnly
from strategies.privacy.adaptive import AdaptiveDp
from strategies.privacy.central import CentralDp
from strategies.privacy.checks import check_dp
from strategies.privacy.distributed import DistributedDp
from strategies.privacy.per_example import ExampleDp
from strategies.secagg.parameters import Parameters, choose
from strategies.secagg.ring import Sum, Sums

if TYPE_CHECKING:
    from engine.config.federation import Federation


@dataclass(frozen=True, kw_only=True)
class SecAgg:
    """Secure aggregation (SecAgg+): the server learns sums alone. "full" runs it, "ideal" gives its bits without masks.

    Values are integers in a ring of 2^`bits`: coordinates of the update are clipped to +-`bound`, and sums beside the
    update to what `bounds` says of each by name. The graph bears the shares `corrupt`
    and `dropout` of the cohort, and with `semi_malicious` a server that lies about who dropped out; `neighbours` and
    `threshold` set k and t by hand. `active` signs keys and survivors, which holds against a server that lies in
    everything. Coordinates that fewer than `min_contributors` clients give are not summed. A dead slot voids the
    session, whose clients train again, or counts as their "dropout". More than `max_aborts` rounds without a result end
    the run.
    """

    mode: Literal["off", "ideal", "full"] = "off"
    bound: float = 1.0
    bounds: dict[str, float] = field(default_factory=dict)
    bits: int = 32
    corrupt: float = 0.05
    dropout: float = 0.05
    semi_malicious: bool = False
    neighbours: int | None = None
    threshold: int | None = None
    active: bool = False
    min_contributors: int = 2
    on_slot_death: Literal["void", "dropout"] = "void"
    max_aborts: int = 3

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        below_one("privacy.secagg", corrupt=self.corrupt, dropout=self.dropout)
        at_least("privacy.secagg", 2, min_contributors=self.min_contributors)
        at_least("privacy.secagg", 0, max_aborts=self.max_aborts)
        for name, value in {"bound": self.bound, **self.bounds}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"privacy.secagg's bounds are numbers above 0, but {name} is {value}")

    def parameters(self, clients: int) -> Parameters:
        """k and t for a cohort of so many; ValueError where there are none that bear what is asked."""
        try:
            if self.neighbours is None:
                chosen = choose(clients, self.corrupt, self.dropout, self.semi_malicious, self.active)
                return chosen if self.threshold is None else replace(chosen, threshold=self.threshold)
            threshold = self.neighbours // 2 + 1 if self.threshold is None else self.threshold
            return Parameters(clients, self.neighbours, threshold, self.active)
        except ValueError as error:
            raise ValueError(f"privacy.secagg: {error}") from None

    def sums(self, sums: tuple[Sum, ...], clients: int) -> Sums:
        """The sums in the ring; ValueError where it is too small for the cohort."""
        try:
            return Sums(sums, clients, self.bits)
        except ValueError as error:
            raise ValueError(f"privacy.secagg: {error}") from None


@dataclass(frozen=True)
class NoDp:
    """No differential privacy."""

    kind: Literal["none"] = "none"


Dp = NoDp | CentralDp | AdaptiveDp | DistributedDp | ExampleDp


@dataclass(frozen=True)
class Privacy:
    """What the server may not see, and how little the sums may say about one client or one row.

    `rows_cap` R is a number of rows that everybody may know. With it a client's weight is min(rows, R) / R, whatever
    the other clients have. Rules that weigh clients by their rows need it under secure aggregation and client-level
    noise: rows over the largest client's, as without privacy, would tell each client of the largest one.
    """

    secagg: SecAgg = field(default_factory=SecAgg)
    dp: Annotated[Dp, Field(discriminator="kind")] = field(default_factory=NoDp)
    rows_cap: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        if self.rows_cap is not None:
            at_least("privacy", 1, rows_cap=self.rows_cap)

    @property
    def secure(self) -> bool:
        """Whether sums go through secure aggregation."""
        return self.secagg.mode != "off"

    @property
    def simulated(self) -> bool:
        """Whether noise comes from the recipe's seed, so that its epsilon is what fresh noise would have given."""
        return self.secagg.mode != "full"

    @property
    def public_weights(self) -> bool:
        """Whether a client's weight may depend on nothing but its own rows and what everybody knows."""
        return self.secure or not isinstance(self.dp, NoDp | ExampleDp)

    def weight(self, rows: int, most: int) -> float:
        """The weight, from 0 to 1, that a client's update has before its strategy sees it; `most` rows has the largest.

        1 under privacy without `rows_cap`, where only rules that weigh all clients alike are accepted.
        """
        if self.rows_cap is not None:
            return min(rows, self.rows_cap) / self.rows_cap
        return 1.0 if self.public_weights else rows / most


def weights_of(federation: Federation) -> str:
    """Where clients' weights come from, for the statement of epsilon."""
    cap = federation.privacy.rows_cap
    if _weighs_alike(federation.strategy):
        return "weight 1 for each client"
    counts = "weights that may follow numbers of rows, which are outside of epsilon"
    return counts if cap is None else f"weights min(rows, {cap}) / {cap}"


def _weighs_alike(strategy: Strategy) -> bool:
    return getattr(strategy, "weighting", None) == "uniform"


def check_privacy(federation: Federation) -> None:
    """Raises ValueError where privacy asks for what the rest of the recipe does not give, with the way out."""
    privacy, strategy = federation.privacy, federation.strategy
    nothing = not privacy.secure and isinstance(privacy.dp, NoDp)
    if federation.evaluate.without_privacy and (federation.keeps_state or nothing):
        why = "clients' state belongs to the one run" if federation.keeps_state else "there is no privacy to do without"
        raise ValueError(f"evaluate.without_privacy plays all rounds twice, but {why}: leave it out")
    beside = strategy.beside(NO_LAYOUT)
    if not isinstance(privacy.dp, NoDp):
        peft = federation.model.peft
        check_dp(
            privacy.dp,
            strategy,
            beside,
            privacy.secagg.mode,
            mixed_ranks=peft.kind == "lora" and any(share.r != peft.r for share in peft.ranks),
        )
        if federation.clients.min_share > 0 or federation.clients.on_too_few == "skip":
            raise ValueError(
                "a round that has no result because few clients took part tells how many did, which noise would have "
                "hidden: leave clients.min_share and clients.on_too_few out, or privacy.dp"
            )
    if privacy.secure:
        _check_reads(federation)
    if privacy.public_weights:
        _check_weights(federation)
    if not privacy.secure:
        return
    dp, varies = privacy.dp, not isinstance(federation.cohort, UniformCohort)
    claims = ("poisson", "auto") if isinstance(dp, CentralDp) else ("poisson",)
    if isinstance(dp, CentralDp | DistributedDp) and varies and dp.sampling in claims:
        raise ValueError(
            "a Poisson cohort that is too small for secure aggregation has no sum, which tells how many came, so that "
            'its sampling hides nothing: set privacy.dp.sampling = "none"'
        )
    secagg, name = privacy.secagg, _named(strategy)
    distributed = isinstance(privacy.dp, DistributedDp)
    if (missing := [other for other in beside if other not in secagg.bounds]) and not distributed:
        raise ValueError(
            f"{name} sends the sum {missing[0]!r} beside the update, and a ring needs to know how large its "
            f"coordinates may be: set privacy.secagg.bounds.{missing[0]}, above which they are clipped"
        )
    if unknown := [other for other in secagg.bounds if other not in beside]:
        raise ValueError(f"privacy.secagg.bounds names {unknown[0]!r}, but {name} sends no such sum: take it out")
    cohort = federation.cohort
    largest = cohort.size if isinstance(cohort, UniformCohort) else cohort.cap
    if largest is None:
        return  # the driver knows the population
    secagg.parameters(largest)
    secagg.sums((Sum("delta", 1, secagg.bound, "weighted"),), largest)
    if secagg.min_contributors > largest:
        raise ValueError(
            f"privacy.secagg.min_contributors is {secagg.min_contributors}, more than the {largest} clients of a "
            f"cohort: lower it, or raise cohort.size"
        )
    _check_ranks(federation, largest)


def _check_reads(federation: Federation) -> None:
    """Secure aggregation has one sum of all updates to give."""
    strategy, name = federation.strategy, _named(federation.strategy)
    if strategy.reads != "sum":
        what = "each update" if strategy.reads == "each" else "several sums of the same updates"
        raise ValueError(
            f"{name} reads {what}, and secure aggregation gives the server one sum a round: take a rule that reads "
            f'the sum ("centred_clipping", or the transform "clip", bound what a liar can do), or set '
            f'privacy.secagg.mode = "off"'
        )
    if isinstance(strategy, LocalOnly):
        raise ValueError(f"{name} sends nothing that could be summed: leave privacy.secagg out")


def _check_weights(federation: Federation) -> None:
    """What clients send is multiplied by their weights, which must be bounded and tell nothing of other clients."""
    strategy, name = federation.strategy, _named(federation.strategy)
    if not strategy.bounded_weights:
        raise ValueError(
            f"{name} weighs clients without a bound (bounded_weights), so that one of them may move a sum by any "
            f'amount: take a rule with bounded weights, such as "fedavg", or "hetlora" with weighting = "uniform"'
        )
    if federation.privacy.rows_cap is None and not _weighs_alike(strategy):
        raise ValueError(
            f"{name} weighs clients by their rows, which needs a public number of rows from which on all clients "
            f'count the same: set privacy.rows_cap, or strategy.weighting = "uniform"'
        )


def _named(strategy: Strategy) -> str:
    return f'the strategy "{vars(strategy).get("kind", type(strategy).__name__)}"'


def _check_ranks(federation: Federation, cohort: int) -> None:
    """Rows of an adapter that only clients of a high rank have are a block of their own in the sum."""
    peft = federation.model.peft
    if peft.kind != "lora" or not peft.ranks or not isinstance(federation.strategy, HetLora):
        return
    share = sum(one.share for one in peft.ranks if one.r == peft.r)
    least = federation.privacy.secagg.min_contributors
    if share * cohort < least:
        raise ValueError(
            f"of a cohort of {cohort}, {share * cohort:g} clients are expected to have rank {peft.r}, and "
            f"privacy.secagg.min_contributors asks for {least} for each coordinate: raise cohort.size or the share, "
            f'or take "flexlora", whose sums hold everybody\'s products'
        )
