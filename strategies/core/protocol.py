"""The central types: what travels between server and clients, and what a strategy is. Legend: P parameters, K clients.

A Vector is a flat, contiguous float32 tensor (P,) on the CPU: one put, one sum, one mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch

from strategies.core.layout import Layout

Vector = torch.Tensor
Vectors = torch.Tensor  # (K, P): those of K clients
Mask = torch.Tensor  # (P,) bool: which coordinates of a vector are meant
ClientState = dict[str, Vector]
Reads = Literal["sum", "passes", "each"]

GLOBAL = "global"  # the name of the local training whose change is the update
NO_LAYOUT = Layout((), ())


@dataclass(frozen=True)
class ServerState:
    """All state of a strategy: the global vector, its moments by name, and its merged delta.

    `merged_delta` is what the rule has merged into the base: the products (O, I) of `layout.product_shapes`, one after
    another in one vector, the scale folded in; None as long as the base is as it was. `layout` says what lies where in
    the vector, `seed` is the recipe's, for rules that draw, `population` how many clients may be sampled; they never
    change.
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
    """What a client of a round receives: the global vector, and what the rule adds to it.

    `layout` says what lies where in the vector. `rank` is the client's own LoRA rank if ranks are mixed, filled in on
    the client: its adapters then have the scale `layout.scale_at(rank)`, and the rows of A and columns of B from `rank`
    on must be zero and stay so. `seed` is the recipe's, for what all clients of a round must draw alike. `whole_norm`
    gives a vector's L2 norm from that of the part at hand: more than that part only in a gang of ZeRO ranks.
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

    Metrics from local training: `steps`, `rows`, `tokens`, `loss`, `rates` (the sum of all steps' learning rates), and
    `loss_before` where the strategy asks for it.
    """

    client: int
    weight: float
    delta: Vector
    extras: dict[str, Vector] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """What the server may see: total = sum of weight * delta (P,), the sum of weights, sums of extras, and the count.

    `each` holds the single updates, in the order of clients, for rules that read them, and is None for all others.
    Their vectors are mapped, not copied: work on them in blocks of coordinates.
    """

    weight: float
    total: Vector
    extras: dict[str, Vector]
    count: int
    each: tuple[Update, ...] | None = None


class Strategy(Protocol):
    """A federated algorithm: pure functions whose fields are its hyperparameters and its section of the recipe.

    FedAvg has a default for everything but its own rule; others extend it. A class says of itself what it `reads`,
    whether it `needs_lora` and allows `mixed_ranks`, is `elementwise` (both halves work on parts of vectors), whether a
    client `keeps_state`, wants its `loss_before` training, `freezes` or keeps at home a part of the
    vector, and `personalizes`: gives clients models of their own. `bounded_weights`: `finish` makes no weight above 1
    of one that is at most 1.

    Two more say what differential privacy of clients may clip, noise and divide by a public number.
    `extras_are_changes`: each sum beside the update is of the client's weight times a change that its training made,
    zero without training, and `apply` adds it over `Aggregate.weight`. `keeps_higher_ranks`: with mixed ranks, a client
    that has not trained sends zeros also beyond its own rank.
    """

    reads: ClassVar[Reads]
    needs_lora: ClassVar[bool]
    mixed_ranks: ClassVar[bool]
    elementwise: ClassVar[bool]
    keeps_state: ClassVar[bool]
    loss_before: ClassVar[bool]
    freezes: ClassVar[bool]
    personalizes: ClassVar[bool]
    extras_are_changes: ClassVar[bool]
    keeps_higher_ranks: ClassVar[bool]
    paper: ClassVar[str]

    @property
    def bounded_weights(self) -> bool:
        """Whether `finish` keeps weights from 0 to 1; classes declare it as a ClassVar, or by their fields."""
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

        It may write nothing else. Extras (P,) and memory (P,) or (K, P) broadcast over K.
        """
        ...

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """The client's last word on its update, and what it remembers; `ends` are the personal runs' final vectors."""
        ...

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The vector (P,) that the client itself would use, from what it remembers; None if that is the global one."""
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
        """How many updates a round must bring at least for the rule to make sense."""
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

    @property
    def kind(self) -> str:
        """Its name in the recipe."""
        ...

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps something in the client's state."""
        ...

    def encode(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The update as it travels, and what the client keeps; `client_state` is this transform's own part."""
        ...

    def decode(self, aggregate: Aggregate, state: ServerState, rng: torch.Generator) -> tuple[Aggregate, ServerState]:
        """The aggregate of plain updates from that of encoded ones; `state` is that of the round's broadcast."""
        ...

    def size(self, size: Size) -> Size:
        """What its output costs if its input costs `size`."""
        ...
