"""The partition by shards: rows sorted by label, cut into equal pieces, and a few pieces for each client."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import at_least, by_label, enough_rows, even, numbered
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Rows sorted by `label` and cut into shards, of which each client gets `shards` at random.

    Shards have `shard_rows` rows, or as many as there can be. With `shard_rows` alone, all shards are dealt, the
    first clients getting one more where it does not come out even. Rows that fill no shard are nobody's; with
    `keep_rest` and `shard_rows` alone, they are one more shard.

    McMahan et al. 2017 (arXiv 1602.05629, section 3) and flwr-datasets' ShardPartitioner.
    """

    kind: Literal["shards"] = "shards"
    label: str
    clients: int
    shards: int | None = None
    shard_rows: int | None = None
    keep_rest: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a number below 1, and for keys that do not go together."""
        at_least("clients", self.clients, 1)
        if self.shards is None and self.shard_rows is None:
            raise ValueError("data.partition needs shards (how many a client gets), shard_rows, or both: give one")
        if self.shards is not None:
            at_least("shards", self.shards, 1)
        if self.shard_rows is not None:
            at_least("shard_rows", self.shard_rows, 1)
        if self.keep_rest and self.shards is not None:
            raise ValueError("data.partition.keep_rest goes with shard_rows alone: leave out keep_rest or shards")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises ValueError if the column has no label in a row, or there are fewer shards than asked for."""
        found = labels(table, "data.partition.label", self.label)
        enough_rows(self.clients, table.num_rows)
        size, there_are, counts = self._cut(table.num_rows)
        order, _ = by_label(found, rng)
        owners = np.full(there_are + 1, -1, np.int32)  # the last is for the rows that fill no shard
        owners[rng.permutation(there_are)[: counts.sum()]] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        clients = np.empty(table.num_rows, np.int32)
        clients[order] = owners[np.minimum(np.arange(table.num_rows) // size, there_are)]
        return Assignment(clients, numbered(self.clients), category=found.texts())

    def _cut(self, rows: int) -> tuple[int, int, NDArray[np.int64]]:
        """The rows of a shard, how many shards there are, and how many each client gets."""
        wanted = self.clients * (self.shards or 1)
        size = self.shard_rows or max(rows // wanted, 1)
        there_are = -(-rows // size) if self.keep_rest else rows // size
        if there_are < wanted:
            raise ValueError(
                f"data.partition asks for {wanted} shards ({self.clients} clients, {self.shards or 1} each or more), "
                f"but {rows} distinct rows make only {there_are} of {size} rows: ask for fewer clients or shards, "
                "or for smaller ones"
            )
        if self.shards is None:
            return size, there_are, even(there_are, self.clients)
        return size, there_are, np.full(self.clients, self.shards)
