"""The central types: messages between server and clients, and what a strategy is. Legend: P parameters, K clients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch

from strategies.core.layout import Layout

Vector = torch.Tensor  # (P,) float32, contiguous, on the CPU: it is put, summed and masked as a whole
Vectors = torch.Tensor  # (K, P): the vectors of K clients
Mask = torch.Tensor  # (P,) bool: a choice of coordinates
ClientState = dict[str, Vector]  # what a client keeps from one of its rounds to the next
Reads = Literal["sum", "passes", "each"]

GLOBAL = "global"  # the name of the local training whose change is the update
NO_LAYOUT = Layout((), ())


@dataclass(frozen=True)
class ServerState:
    """All state of a strategy: the global vector, its moments by name, and the merged delta.

    `merged_delta` is what the rule has added to the base: the products (O, I) of `layout.product_shapes`, scale
    included, one after another in one vector; None while the base is unchanged. The engine sets three more, which
    never change: the `layout` of the vector, the recipe's `seed` for rules that draw, and the `population`, the number
    of clients that can be sampled.
    """

    round: int
    params: Vector
    moments: dict[str, Vector] = field(default_factory=dict)
    merged_delta: Vector | None = None
    layout: Layout = NO_LAYOUT
    seed: int = 0
    population: int = 0


@dataclass(frozen=True)
class Broadcast:
    """What the clients of a round receive: the global vector, and the rule's `extras`.

    The engine sets `rank` on the client where ranks are mixed: the adapters then have the scale
    `layout.scale_at(rank)`, and rows of A and columns of B from `rank` on are zero and must stay zero. `seed` is the
    recipe's, for what all clients of a round draw alike. `whole_norm` turns the L2 norm of the part at hand into that
    of the whole vector; the two differ only in a gang of ZeRO ranks.
    """

    round: int
    params: Vector
    extras: dict[str, Vector] = field(default_factory=dict)
    layout: Layout = NO_LAYOUT
    rank: int | None = None
    seed: int = 0
    whole_norm: Callable[[float], float] = float


@dataclass(frozen=True)
class Update:
    """A client's message: delta = client - server (P,), its weight in the sum, unweighted extras, and its metrics.

    Local training gives the metrics `steps`, `rows`, `tokens`, `loss`, `rates` (the sum of all steps' learning rates),
    and `loss_before` where the strategy asks for it.
    """

    client: int
    weight: float
    delta: Vector
    extras: dict[str, Vector] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """What the server may see: total = sum of weight * delta (P,), the sum of weights, sums of extras, and the count.

    `each` holds the single updates in the order of clients for rules that read them, and is None for all others. Its
    vectors are mapped from shared memory: work on them in blocks of coordinates instead of copying them.
    """

    weight: float
    total: Vector
    extras: dict[str, Vector]
    count: int
    each: tuple[Update, ...] | None = None


@dataclass(frozen=True)
class NeedsSgd:
    """Why a rule works only with SGD on its clients, and what to take `instead`; both end an error message.

    `momentum` is the one that the rule counts on; None: any. `constant` asks for one learning rate within a round, and
    `divides` for one above 0.
    """

    why: str
    instead: str = 'use a rule for any optimizer, such as "fedavg"'
    momentum: float | None = None
    constant: bool = False
    divides: bool = False


class Strategy(Protocol):
    """A federated algorithm: pure functions whose fields are its hyperparameters and its section of the recipe.

    `strategies.core.base.Rule` has a default for everything but `apply`. The attributes below declare what the engine
    must know of a rule: it checks recipes by them and never asks for a class. `fedpost strategies --check` holds a rule
    to what it declares.
    """

    reads: ClassVar[Reads]  # "sum"; or "passes", several sums of the same updates; or "each" update
    needs_lora: ClassVar[bool]  # it works on adapters
    rank_parts: ClassVar[int]  # it splits each adapter into so many of equal rank
    mixed_ranks: ClassVar[bool]  # clients may have adapters of different ranks
    elementwise: ClassVar[bool]  # both halves work alike on parts of the vectors
    keeps_basis: ClassVar[bool]  # a coordinate means the same, and is trained or not, in all rounds
    merges_into_base: ClassVar[bool]  # `apply` changes the base: the state gets a merged delta
    sends_update: ClassVar[bool]  # anything leaves the client
    sends_products: ClassVar[bool]  # products of adapters, or sketches of them, travel beside the update
    corrects: ClassVar[bool]  # `correct` changes gradients
    keeps_state: ClassVar[bool]  # clients keep state from round to round
    personalizes: ClassVar[bool]  # clients have models of their own
    freezes: ClassVar[bool]  # a part of the vector is not trained, or stays at home
    loss_before: ClassVar[bool]  # clients send their loss before training
    # Differential privacy of clients may clip the sums beside the update, add noise, and divide by a public number:
    # each sum is of the client's weight times a change, zero without training, and `apply` divides it by the weight.
    extras_are_changes: ClassVar[bool]
    keeps_higher_ranks: ClassVar[bool]  # with mixed ranks, an untrained client sends zeros also beyond its own rank
    paper: ClassVar[str]

    @property
    def bounded_weights(self) -> bool:
        """Whether `finish` makes no weight above 1 of one that is at most 1."""
        ...

    @property
    def rests_at_zero(self) -> bool:
        """Whether a client that has not trained sends zeros, whatever moments and client state hold."""
        ...

    @property
    def weighs_alike(self) -> bool:
        """Whether `finish` gives every client the weight 1."""
        ...

    @property
    def needs_optimizer(self) -> NeedsSgd | None:
        """What the rule counts on in the clients' optimizer; None: any optimizer will do."""
        ...

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """The state before the first round, from the initial global vector (P,)."""
        ...

    def broadcast(self, state: ServerState) -> Broadcast:
        """What the clients of the next round receive."""
        ...

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The vectors (P,) from which a client trains, one after another: "global", then personal ones by name."""
        ...

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """Changes the local gradient of the training `run` in place, before clipping and the local optimizer.

        It may write nothing else. Extras (P,) and client state (P,) or (K, P) broadcast over K.
        """
        ...

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """The update that the client sends, and its next state; `ends` are the personal trainings' final vectors."""
        ...

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The vector (P,) that the client itself would use, from its state; None if that is the global one."""
        ...

    def beside(self, layout: Layout) -> dict[str, int]:
        """Names and lengths of the sums that clients send beside their delta, as extras of the update."""
        ...

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Where all clients of a round send zeros by the rule: False in the mask (P,) of "delta" or of an extra.

        A vector without a mask is live everywhere. Frozen coordinates get no noise and no place in secure sums.
        """
        ...

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """The coordinates that the client's training `run` may move, whether it sends them or not; None: all.

        Example-level privacy clips and adds noise to these alone, so `correct` must zero all other gradients, unless
        they are zero by themselves.
        """
        ...

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """How many float32 numbers a real client would receive and send in a round."""
        ...

    def smallest_cohort(self) -> int:
        """The smallest number of updates in a round with which the rule makes sense."""
        ...

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The next state; on any part of the vectors alike where the rule is `elementwise`."""
        ...


@dataclass(frozen=True)
class Size:
    """What a vector costs on the wire: `values` numbers of `bits` each, and `extra` bits of scales and positions.

    `length` is the vector's; `values` is smaller where the receiver knows the rest to be zero.
    """

    length: int
    values: int
    bits: int = 32
    extra: int = 0


class Transform(Protocol):
    """What happens to an update on its way: pure functions whose fields are a section of the recipe.

    Several form a chain: clients encode in its order, the server decodes in reverse. An encoded update is a vector that
    may be summed with others; its weight and extras stay as they are.
    """

    keeps_zeros: ClassVar[bool]  # zeros of the update arrive as zeros, in a vector of the same length
    works_on_shards: ClassVar[bool]  # each rank of a gang may encode its own shard

    @property
    def kind(self) -> str:
        """Its name in the recipe."""
        ...

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps a part of the client's state."""
        ...

    def encode(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The update as it travels, and this transform's own part of the client's next state."""
        ...

    def decode(self, aggregate: Aggregate, state: ServerState, rng: torch.Generator) -> tuple[Aggregate, ServerState]:
        """The aggregate of plain updates from that of encoded ones; `state` is that of the round's broadcast."""
        ...

    def size(self, size: Size) -> Size:
        """What its output costs if its input costs `size`."""
        ...
