"""What a strategy is, with a default for everything but the rule itself. Legend: P parameters, K clients."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

from strategies.core.access import Capability
from strategies.core.errors import require
from strategies.core.layout import Layout
from strategies.core.protocol import (
    GLOBAL,
    Aggregate,
    Broadcast,
    ClientState,
    Mask,
    Score,
    ServerState,
    Update,
    Vector,
)
from strategies.core.ranges import ABOVE_0, BELOW_1, Range, check_ranges
from strategies.core.seeds import rng

Reads = Literal["sum", "passes", "each"]
Vectors = torch.Tensor  # (K, P): the vectors of K clients
Ends = dict[str, Vector] | None  # the final vectors of a client's personal trainings, by name
Finished = tuple[Update, ClientState]  # what a client sends and what it keeps
Searched = tuple[Vector, dict[str, Vector]]  # a client's change (P,), and what it sends beside that
ServerLr = Annotated[float, Range("is the server's learning rate", ABOVE_0)]
Decay = Annotated[float, Range("is what a moment keeps", BELOW_1)]


@dataclass(frozen=True)
class NeedsSgd:
    """Why a rule works only with SGD on its clients, and what to take `instead`; both end an error message.

    `momentum` is what the rule counts on (None: any); `constant`: one learning rate within a round; `divides`: the rule
    divides by it, so it must be above 0.
    """

    why: str
    instead: str = 'use a rule for any optimizer, such as "fedavg"'
    momentum: float | None = None
    constant: bool = False
    divides: bool = False


@dataclass(frozen=True)
class Rule(ABC):
    """A federated algorithm: pure functions whose fields are its hyperparameters and its section of the recipe.

    By default it reads the sum, and clients train as usual and keep no state; a rule overrides what differs. The
    attributes declare what the engine must know: it checks recipes by them and never asks for a class, and `fedpost
    strategies --check` holds a rule to them. A shipped rule also has a `kind`, its tag in the recipe.
    """

    reads: ClassVar[Reads] = "sum"  # or "passes", several sums of the same updates, or "each" update
    needs_lora: ClassVar[bool] = False  # it works on adapters
    lora_rank_multiple: ClassVar[int] = 1  # model.peft.r must be a multiple of it: adapters are split into that number
    mixed_ranks: ClassVar[bool] = False  # clients may have adapters of different ranks
    elementwise: ClassVar[bool] = True  # both halves work alike on parts of the vectors
    keeps_basis: ClassVar[bool] = True  # a coordinate means the same, and is trained or not, in all rounds
    begins_fresh: ClassVar[bool] = False  # its first round needs adapters whose product is zero: no start goes with it
    merges_into_base: ClassVar[bool] = False  # `apply` changes the base: the state gets a merged delta
    sends_update: ClassVar[bool] = True  # anything leaves the client
    sends_products: ClassVar[bool] = False  # products of adapters, or sketches of them, travel beside the update
    corrects: ClassVar[bool] = False  # `correct` changes gradients; set for each class that overrides it
    keeps_state: ClassVar[bool] = False  # clients keep state from round to round
    personalizes: ClassVar[bool] = False  # clients have models of their own
    freezes: ClassVar[bool] = False  # a part of the vector is not trained, or stays with its client
    loss_before: ClassVar[bool] = False  # clients send their loss before training
    # Differential privacy of clients may clip the sums beside the update, add noise, and divide by a public number:
    # each sum is of the client's weight times a change, zero without training, and `apply` divides it by the weight.
    extras_are_changes: ClassVar[bool] = False
    keeps_higher_ranks: ClassVar[bool] = False  # an untrained client of a low rank sends zeros beyond its rank too
    tunes: ClassVar[tuple[str, ...]] = ()  # the kinds of model.peft that it tunes; empty: all that gradients train
    searches: ClassVar[bool] = False  # clients judge candidates and train nothing; set for a class that has `search`
    # What follows is for the defaults below alone:
    zero_moments: ClassVar[tuple[str, ...]] = ()  # the names of the moments (P,) that `init` sets to zero
    sends_moments: ClassVar[bool] = False  # `broadcast` sends all moments as extras
    trains_what_it_sends: ClassVar[bool] = True  # clients train what they send; otherwise everything
    receives_what_it_sends: ClassVar[bool] = False  # only what they send comes down: clients have the rest
    paper: ClassVar[str] = "unpublished"

    def __post_init__(self) -> None:
        check_ranges(self, "strategy.")
        way = 'write needs_optimizer = NeedsSgd("counts on ...") (strategies.core.base), or leave it out'
        require(isinstance(self.needs_optimizer, NeedsSgd | None), f"{named(self)} does not say what it needs: {way}")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.corrects = cls.correct is not Rule.correct
        cls.searches = cls.search is not Rule.search

    @property
    def access(self) -> frozenset[Capability] | None:
        """What its clients use of the base; None: what training the recipe's kind of model.peft takes."""
        return None

    @property
    def judges_by(self) -> Literal["loss", "match"]:
        """What a searching rule's scores are: sums of losses, or numbers of rows that are not written word for word."""
        return "loss"

    @property
    def bounded_weights(self) -> bool:
        """Whether `finish` makes no weight above 1 of one that is at most 1."""
        return True

    @property
    def rests_at_zero(self) -> bool:
        """Whether a client that has not trained sends zeros."""
        return True

    @property
    def weighs_alike(self) -> bool:
        """Whether `finish` gives every client the weight 1."""
        return False

    @property
    def picks_coordinates(self) -> bool:
        """Whether clients choose by their data which coordinates they send, so that a sum may hold one client's."""
        return False

    @property
    def needs_optimizer(self) -> NeedsSgd | None:
        """What the rule counts on in the clients' optimizer; None: any optimizer will do."""
        return None

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """The state before the first round, from the initial global vector (P,)."""
        return ServerState(0, params, {name: torch.zeros_like(params) for name in self.zero_moments}, layout=layout)

    def broadcast(self, state: ServerState) -> Broadcast:
        """What the clients of the next round receive."""
        extras = dict(state.moments) if self.sends_moments else {}
        return Broadcast(state.round, state.params, extras, state.layout, seed=state.seed)

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The vectors (P,) from which a client trains, one after another: "global", then personal ones by name."""
        return {GLOBAL: broadcast.params}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """Changes the local gradient of `model`, as `starts` names it, in place, before clipping and the optimizer.

        It may write nothing else. Extras (P,) and client state (P,) or (K, P) broadcast over K.
        """
        return

    def search(self, client: int, broadcast: Broadcast, client_state: ClientState, score: Score) -> Searched:
        """What a client of a searching rule sends in place of a trained change; `score` judges candidates."""
        return torch.zeros_like(broadcast.params), {}

    def walk(self, client: int, broadcast: Broadcast, steps: int) -> np.ndarray:
        """The numbers (steps,) of the directions along which a client of the kind "seeds" goes."""
        return rng(broadcast.seed, broadcast.round, client, "directions").integers(len(broadcast.params), size=steps)

    def sent(self, update: Update) -> int | None:
        """How many numbers an update takes on the wire, if fewer than `floats` says."""
        return None

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """The update that the client sends, and its next state; `ends` are the personal trainings' final vectors."""
        return update, client_state

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The vector (P,) that the client itself would use, from its state; None if that is the global one."""
        return None

    def beside(self, layout: Layout) -> dict[str, int]:
        """Names and lengths of the sums that clients send beside the delta: by default products if `sends_products`."""
        return {"product": layout.product_size} if self.sends_products else {}

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Where all clients of a round send zeros by the rule: False in the mask (P,) of "delta" or of an extra.

        A vector without a mask is sent whole. Frozen coordinates get no noise and no place in secure sums.
        """
        return {}

    def trained_mask(self, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL) -> Mask | None:
        """The coordinates that the client's training of `model` may move, whether it sends them or not; None: all.

        Example-level privacy clips and adds noise to these alone: `correct` must zero all other gradients.
        """
        return self.sent_masks(broadcast.round, broadcast.layout).get("delta") if self.trains_what_it_sends else None

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """How many float32 numbers a real client would receive and send in a round."""
        size = broadcast.params.numel()
        layout = broadcast.layout if broadcast.layout.size == size else Layout(("shard",), ((size,),))
        sent_masks = self.sent_masks(broadcast.round, layout)
        lengths = {"delta": size, **self.beside(layout)}
        sent = sum(int(sent_masks[name].sum()) if name in sent_masks else length for name, length in lengths.items())
        return sent if self.receives_what_it_sends else size + sum(map(torch.numel, broadcast.extras.values())), sent

    def smallest_cohort(self) -> int:
        """The smallest number of updates in a round with which the rule makes sense."""
        return 1

    @abstractmethod
    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The next state; on any part of the vectors alike where the rule is `elementwise`."""


@dataclass(frozen=True)
class AveragingRule(Rule):
    """A rule around the clients' mean change: theta += lr * sum_k p_k delta_k with p_k = w_k / sum w.

    `weighting` sets w_k: "examples" is the client's number of training rows over a number that all clients of a round
    share, or min(rows, R) / R with privacy.rows_cap = R; "uniform" is 1.
    """

    lr: ServerLr = 1.0
    weighting: Literal["examples", "uniform"] = "examples"

    @property
    def weighs_alike(self) -> bool:
        """Whether the recipe asks for it, unless clients weigh by something without a bound."""
        return self.weighting == "uniform" and self.bounded_weights

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sets the weight."""
        return replace(update, weight=1.0) if self.weighs_alike else update, client_state

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr * total / weight."""
        return step(state, aggregate, self.lr)


def step(state: ServerState, aggregate: Aggregate, lr: float) -> ServerState:
    """The next state after theta += lr * total / weight, with the same moments."""
    change = aggregate.total * (lr / aggregate.weight)
    return replace(state, round=state.round + 1, params=change.add_(state.params))


def named(strategy: object) -> str:
    """A strategy in an error message: its kind, or the class name of a user's own."""
    shipped = type(strategy).__module__.split(".")[0] == "strategies"
    return f"the strategy {(vars(strategy)['kind'] if shipped else type(strategy).__name__)!r}"
