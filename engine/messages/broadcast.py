"""What the clients of a round start from, as it crosses Ray. Legend: P parameters, S of a rank's shard."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from datasets_partition.store.store import SplitName
from engine.messages.row_columns import RowColumn
from engine.messages.shards import Shard, borrow, borrow_all
from strategies.core.base import Rule
from strategies.core.layout import Layout
from strategies.core.protocol import Broadcast, ServerState, Vector
from strategies.core.sharding import Partition
from strategies.privacy.checks import NoisePlan

WITHIN_CALLS = 65_536  # bytes, well below what Ray puts into the store by itself


def share(message: Any) -> Any:
    """Returns what many calls carry of a message: a reference, or the message itself if its `nbytes` are few."""
    return message if message.nbytes <= WITHIN_CALLS else ray.put(message)


@dataclass(frozen=True)
class BroadcastMessage:
    """A broadcast whose only shard is whole, or references to the server's state in shards, cut by `partition`."""

    round: int
    shards: tuple[Any, ...]
    nbytes: int = 0  # of the shards in the object store
    partition: Partition | None = None
    reference: tuple[Any, ...] = ()  # references to the objective's reference model: its vector, or each rank's shard
    row_column: tuple[Any, ...] = ()  # a reference to what the reference model says of all rows (RowColumn), if stored
    # Orders for a round of training; other messages have the defaults, which nobody reads:
    oldest: int = 0  # client state from before this round may be deleted
    noise_plan: NoisePlan | None = None  # how clients bound what they send, and their noise
    clip: float = 0.0  # the round's clipping norm
    lanes: int = 1  # the most clients that train together
    full_rows: float = math.nan  # the rows of weight 1; NaN where weights are public

    @classmethod
    def of(cls, broadcast: Broadcast) -> "BroadcastMessage":
        """Shares the memory of the broadcast's vectors."""
        shard = Shard.of(broadcast.params, broadcast.extras)
        return cls(broadcast.round, (shard,), shard.nbytes)

    def vector(self, rank: int | None = None) -> Vector:
        """Returns the vector (P,), or a rank's shard of it (S,), over the store's own memory where it lies whole."""
        if self.partition is None:
            return borrow(self.shards[0].params)
        if rank is not None:
            return borrow(ray.get(self.shards[rank]).params)
        return self._joined([shard.params for shard in ray.get(list(self.shards))])

    def reference_vector(self, rank: int | None = None) -> Vector | None:
        """Returns the reference model's vector (P,), or a rank's shard of it (S,); None if there is none."""
        if not self.reference:
            return None
        shard: Shard = ray.get(self.reference[rank or 0])
        return borrow(shard.params)

    def beside(self, rows: pa.RecordBatch, client: int, split: SplitName) -> pa.RecordBatch:
        """Returns a client's rows with what the reference model says of them, if it is stored."""
        if not self.row_column:
            return rows
        column: RowColumn = ray.get(self.row_column[0])
        return column.beside(rows, client, split)

    def received(self, strategy: Rule, layout: Layout, seed: int, rank: int | None = None) -> Broadcast:
        """Returns what the clients of a worker receive: whole vectors, or those of a rank's shard."""
        if self.partition is None:
            (shard,) = self.shards
            return Broadcast(self.round, borrow(shard.params), borrow_all(shard.vectors), layout=layout, seed=seed)
        if rank is not None:
            return strategy.broadcast(ray.get(self.shards[rank]).state(self.round, seed))
        shards: list[Shard] = ray.get(list(self.shards))
        vectors = {name: self._joined([shard.vectors[name] for shard in shards]) for name in shards[0].vectors}
        params = self._joined([shard.params for shard in shards])
        return replace(strategy.broadcast(ServerState(self.round, params, vectors, seed=seed)), layout=layout)

    def _joined(self, shards: Sequence[np.ndarray]) -> Vector:
        assert self.partition is not None
        return self.partition.join([borrow(shard) for shard in shards])
