"""How vectors cross Ray: as flat NumPy arrays, mapped from the store without a copy; torch tensors would be pickled."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ServerState, Update
from strategies.core.sharding import Partition
from strategies.privacy.central import CentralPlan
from strategies.privacy.distributed import DistributedPlan
from strategies.privacy.per_example import ExamplePlan


@dataclass(frozen=True)
class WireBroadcast:
    """A Broadcast as it lies in the object store; clients' memories from before round `oldest` may be forgotten.

    `dp` says how clients bound what they send and what noise they add, `clip` is the round's clipping norm. Clients of
    a pack train in so many `lanes`.
    """

    round: int
    params: np.ndarray
    extras: dict[str, np.ndarray]
    oldest: int = 0
    dp: CentralPlan | DistributedPlan | ExamplePlan | None = None
    clip: float = 0.0
    lanes: int = 1


@dataclass(frozen=True)
class WireState:
    """A shard of the server's state as it lies in the object store: ranks look at it, the driver does not."""

    params: np.ndarray
    moments: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """What it takes in the store."""
        return self.params.nbytes + sum(moment.nbytes for moment in self.moments.values())


@dataclass(frozen=True)
class WireAggregate:
    """A shard of an Aggregate as it lies in the object store, where secure aggregation has given the sums."""

    weight: float
    total: np.ndarray
    extras: dict[str, np.ndarray]
    count: int


@dataclass(frozen=True)
class ShardTotals:
    """What the server learns where sums are in shards: references to WireAggregate, and the clients' figures."""

    count: int
    weight: float
    parts: tuple[Any, ...]
    figures: dict[str, float]


@dataclass(frozen=True)
class ShardedState:
    """The server's state as the driver knows it: a tuple of shards. A whole vector is one shard.

    A shard is a ServerState in this process, or a reference to a WireState; `nbytes` is what the references' shards
    take in the object store.
    """

    round: int
    parts: tuple[Any, ...]
    nbytes: int = 0


@dataclass(frozen=True)
class ShardSum:
    """A slot's sum as the driver knows it: references to its shards (PartialSum), and their bytes."""

    parts: tuple[Any, ...]
    nbytes: int


@dataclass(frozen=True)
class Sent:
    """What gangs start from: the state's shards, of which each rank fetches its own; the rest as in WireBroadcast."""

    round: int
    parts: tuple[Any, ...]
    partition: Partition
    nbytes: int = 0
    oldest: int = 0
    dp: CentralPlan | None = None
    clip: float = 0.0
    lanes: int = 1


NOT_TRAINED = "it could not be trained"
DOWN, UP = "protocol_bytes_down", "protocol_bytes_up"  # metrics of a report


@dataclass(frozen=True)
class Report:
    """What became of one client in a round: its metrics, why its update could not be used, or how `late` it came.

    That is in seconds after the deadline. `seconds` is how long its slot worked for it: of a pack, its share. `tried`
    says of attempts before why they failed.
    """

    client: int
    metrics: dict[str, float]
    failed: str | None = None
    late: float = 0.0
    seconds: float = field(default=0.0, compare=False)
    tried: tuple[str, ...] = ()

    @classmethod
    def of_nothing(cls, client: int, tried: tuple[str, ...]) -> "Report":
        """Of a client that could not be trained, whatever was tried."""
        return cls(client, {DOWN: 0.0, UP: 0.0}, NOT_TRAINED, tried=tried)

    @property
    def good(self) -> bool:
        """Whether its update counts."""
        return self.failed is None and not self.late

    @property
    def why(self) -> str | None:
        """Why it gave nothing, with the last cause where it is known."""
        return f"{self.failed}: {self.tried[-1]}" if self.failed == NOT_TRAINED and self.tried else self.failed


@dataclass(frozen=True)
class WireUpdate:
    """An Update as it lies in the object store."""

    client: int
    weight: float
    delta: np.ndarray
    extras: dict[str, np.ndarray]
    metrics: dict[str, float]


def to_wire(got: Broadcast) -> WireBroadcast:
    """The broadcast without torch; shares its memory."""
    extras = {name: extra.numpy() for name, extra in got.extras.items()}
    return WireBroadcast(got.round, got.params.numpy(), extras)


def from_wire(wire: WireBroadcast, layout: Layout, seed: int) -> Broadcast:
    """The broadcast over the store's own memory, which nobody may write."""
    extras = {name: borrow(extra) for name, extra in wire.extras.items()}
    return Broadcast(wire.round, borrow(wire.params), extras, layout=layout, seed=seed)


def update_to_wire(update: Update) -> WireUpdate:
    """The update without torch, copied: what trained it may have lent it its own memory."""
    extras = {name: extra.numpy().copy() for name, extra in update.extras.items()}
    return WireUpdate(update.client, update.weight, update.delta.numpy().copy(), extras, update.metrics)


def update_from_wire(wire: WireUpdate) -> Update:
    """The update over the store's own memory, which nobody may write."""
    extras = {name: borrow(extra) for name, extra in wire.extras.items()}
    return Update(wire.client, wire.weight, borrow(wire.delta), extras, wire.metrics)


def state_to_wire(state: ServerState) -> WireState:
    """The state's shard without torch; shares its memory."""
    return WireState(state.params.numpy(), {name: moment.numpy() for name, moment in state.moments.items()})


def state_from_wire(wire: WireState, round_: int, seed: int, population: int = 0) -> ServerState:
    """The state's shard over the store's own memory, which nobody may write."""
    moments = {name: borrow(moment) for name, moment in wire.moments.items()}
    return ServerState(round_, borrow(wire.params), moments, seed=seed, population=population)


def aggregate_from_wire(wire: WireAggregate) -> Aggregate:
    """The aggregate's shard over the store's own memory, which nobody may write."""
    extras = {name: borrow(extra) for name, extra in wire.extras.items()}
    return Aggregate(wire.weight, borrow(wire.total), extras, wire.count)


def joined(sent: Sent, shards: list[WireState], seed: int) -> ServerState:
    """The whole state from all its shards."""

    def whole(parts: list[np.ndarray]) -> torch.Tensor:
        return sent.partition.join([borrow(part) for part in parts])

    moments = {name: whole([shard.moments[name] for shard in shards]) for name in shards[0].moments}
    return ServerState(sent.round, whole([shard.params for shard in shards]), moments, seed=seed)


def borrow(array: np.ndarray) -> torch.Tensor:
    """A tensor over a read-only array's memory, for reading alone: torch cannot mark it so, hence its warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
