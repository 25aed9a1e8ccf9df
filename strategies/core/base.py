"""The neutral bases of rules: defaults for everything but the rule itself. Legend: P parameters, K clients."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.core.errors import require
from strategies.core.layout import Layout
from strategies.core.protocol import (
    GLOBAL,
    Aggregate,
    Broadcast,
    ClientState,
    Mask,
    NeedsSgd,
    Reads,
    ServerState,
    Update,
    Vector,
    Vectors,
)


@dataclass(frozen=True)
class Rule(ABC):
    """A rule with every default of the protocol: it reads the sum, and clients train as usual and keep no state.

    A subclass overrides what differs and declares what the engine must know (see `Strategy`); only `apply` has no
    default. A shipped rule also has a `kind`, its tag in the recipe.
    """

    reads: ClassVar[Reads] = "sum"
    needs_lora: ClassVar[bool] = False
    rank_parts: ClassVar[int] = 1
    mixed_ranks: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    keeps_basis: ClassVar[bool] = True
    merges_into_base: ClassVar[bool] = False
    sends_update: ClassVar[bool] = True
    sends_products: ClassVar[bool] = False
    corrects: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = False
    personalizes: ClassVar[bool] = False
    freezes: ClassVar[bool] = False
    loss_before: ClassVar[bool] = False
    extras_are_changes: ClassVar[bool] = False
    keeps_higher_ranks: ClassVar[bool] = False
    paper: ClassVar[str] = "unpublished"

    def __init_subclass__(cls) -> None:
        """Declares `corrects` for each class that overrides `correct`."""
        super().__init_subclass__()
        cls.corrects = cls.correct is not Rule.correct

    @property
    def bounded_weights(self) -> bool:
        """The engine's weights are at most 1, and `finish` leaves them as they are."""
        return True

    @property
    def weighs_alike(self) -> bool:
        """The engine's weights follow the clients' rows."""
        return False

    @property
    def needs_optimizer(self) -> NeedsSgd | None:
        """Any optimizer will do."""
        return None

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """The initial vector (P,), without moments."""
        return ServerState(0, params, layout=layout)

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, without extras."""
        return Broadcast(state.round, state.params, layout=state.layout, seed=state.seed)

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector alone."""
        return {GLOBAL: broadcast.params}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """Leaves the gradient as it is."""
        return

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends the update as it is, and keeps the client's state."""
        return update, client_state

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The client uses the global model."""
        return None

    def beside(self, layout: Layout) -> dict[str, int]:
        """Nothing beside the update."""
        return {}

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Every coordinate."""
        return {}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """The coordinates of the update that are live."""
        return self.live(broadcast.round, broadcast.layout).get("delta")

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The vector and the extras down, the vector up."""
        extras = sum(extra.numel() for extra in broadcast.extras.values())
        return broadcast.params.numel() + extras, broadcast.params.numel()

    def smallest_cohort(self) -> int:
        """One update is enough."""
        return 1

    @abstractmethod
    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule itself: the next state."""


@dataclass(frozen=True)
class AveragingRule(Rule):
    """A rule around the clients' mean change: theta += lr * sum_k p_k delta_k with p_k = w_k / sum w.

    `weighting` sets w_k: "examples" is the client's number of training rows over a number that all clients of a round
    share, or min(rows, R) / R with privacy.rows_cap = R; "uniform" is 1.
    """

    lr: float = 1.0
    weighting: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        check_lr(self.lr)

    @property
    def weighs_alike(self) -> bool:
        """Whether the recipe asks for it."""
        return self.weighting == "uniform"

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sets the weight."""
        return replace(update, weight=1.0) if self.weighs_alike else update, client_state

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr * total / weight."""
        return step(state, aggregate, self.lr)


def step(state: ServerState, aggregate: Aggregate, lr: float) -> ServerState:
    """The next state after theta += lr * total / weight, with the same moments."""
    change = aggregate.total * (lr / aggregate.weight)
    return replace(state, round=state.round + 1, params=change.add_(state.params))


def check_lr(lr: float) -> None:
    """Raises StrategyError for a server learning rate that is no number above 0."""
    require(0 < lr < math.inf, f"strategy.lr is the server's learning rate and must be a number above 0, not {lr}")


def check_decay(name: str, value: float) -> None:
    """Raises StrategyError for a moment's decay factor outside [0, 1)."""
    require(0 <= value < 1, f"strategy.{name} is what a moment keeps and must be at least 0 and below 1, not {value}")


def named(strategy: object) -> str:
    """A strategy in an error message: its kind, or the class name of a user's own."""
    shipped = type(strategy).__module__.split(".")[0] == "strategies"
    return f"the strategy {(vars(strategy)['kind'] if shipped else type(strategy).__name__)!r}"
