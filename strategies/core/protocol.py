"""What travels between server and clients, and what both keep. Legend: P parameters, K clients, N sent coordinates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from strategies.core.layout import Layout

Vector = (
    torch.Tensor
)  # (P,) float32, contiguous; on the CPU, except in a client's training, where it lies on its device
Mask = torch.Tensor  # (P,) bool: a choice of coordinates
ClientState = dict[str, Vector]  # what a client keeps from one of its rounds to the next
# Judges candidates (C, P) on a client's rows of the round: their losses (C,), float64, and the number of units in each.
Score = Callable[[torch.Tensor], tuple[torch.Tensor, float]]

GLOBAL = "global"  # the name of the model whose change in local training is the update
NO_LAYOUT = Layout((), ())


@dataclass(frozen=True)
class ServerState:
    """All state of a strategy: the global vector, its moments by name, and the merged delta.

    `merged_delta` is what the rule has added to the base: the products (O, I) of `layout.product_shapes`, scale
    included, one after another in one vector; None while the base is unchanged. The engine sets three more, which
    never change: the `layout` of the vector, the recipe's `seed` for draws, and the `population` of clients to sample.
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

    The engine sets `lora_rank` on the client where LoRA ranks are mixed: the adapters then have the scale
    `layout.scale_at(lora_rank)`, and rows of A and columns of B from `lora_rank` on are zero and must stay zero.
    `seed` is the recipe's, for what all clients of a round draw alike. `whole_norm` turns the L2 norm of the part at
    hand into that of the whole vector; the two differ only in a gang of ZeRO ranks.
    """

    round: int
    params: Vector
    extras: dict[str, Vector] = field(default_factory=dict)
    layout: Layout = NO_LAYOUT
    lora_rank: int | None = None
    seed: int = 0
    whole_norm: Callable[[float], float] = float


@dataclass(frozen=True)
class Update:
    """A client's message: delta = client - server (P,), its weight in the sum, unweighted extras, and its metrics.

    Local training gives the metrics `steps`, `rows`, `tokens`, `learned` (units of the loss's first term), `loss`,
    `rates` (the sum of all steps' learning rates), and `loss_before` where the strategy asks for it.
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
class Size:
    """What a vector costs on the wire: `values` numbers of `bits` each, and `extra` bits of scales and positions.

    `length` is the vector's; `values` is smaller where the receiver knows the rest to be zero.
    """

    length: int
    values: int
    bits: int = 32
    extra: int = 0


def without_frozen(vectors: Mapping[str, Vector], masks: Mapping[str, Mask]) -> dict[str, Vector]:
    """Each vector's sent coordinates (N,); whole where `masks` has no mask of its name."""
    return {name: vector[masks[name]] if name in masks else vector for name, vector in vectors.items()}


def with_frozen(vectors: Mapping[str, Vector], masks: Mapping[str, Mask]) -> dict[str, Vector]:
    """The vectors (P,) that `without_frozen` shortened, with zeros in the frozen coordinates."""
    zeros = {name: vectors[name].new_zeros(len(mask)) for name, mask in masks.items() if name in vectors}
    return {**vectors, **{name: zero.masked_scatter_(masks[name], vectors[name]) for name, zero in zeros.items()}}
