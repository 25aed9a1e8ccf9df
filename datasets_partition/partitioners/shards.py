"""The partition by shards: rows sorted by label, cut into equal pieces, and a few pieces for each client."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import at_least, by_label, enough_rows, even, numbered, placed
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Rows sorted by `label` and cut into shards, of which each client gets `shards` at random.

    Shards have `shard_rows` rows, or as many as there can be. With `shard_rows` alone, all shards are dealt, and the
    first clients get one more where they do not divide. Rows that fill no shard are nobody's; with `keep_rest` and
    `shard_rows` alone, they are one more shard.

    McMahan et al. 2017 (arXiv 1602.05629, section 3) and flwr-datasets' ShardPartitioner.
    """

    kind: Literal["shards"] = "shards"
    label: str
    clients: int
    shards: int | None = None
    shard_rows: int | None = None
    keep_rest: bool = False

    def __post_init__(self) -> None:
        """Raises DataError for a number below 1, and for keys that do not go together."""
        at_least(1, clients=self.clients, shards=self.shards, shard_rows=self.shard_rows)
        if self.shards is None and self.shard_rows is None:
            raise DataError("data.partition needs shards (how many a client gets), shard_rows, or both: give one")
        if self.keep_rest and self.shards is not None:
            raise DataError("data.partition.keep_rest goes with shard_rows alone: leave out keep_rest or shards")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if a row has no label, or there are fewer shards than asked for."""
        coded = labels(table, "data.partition.label", self.label)
        enough_rows(self.clients, table.num_rows)
        size, shards, counts = self._cut(table.num_rows)
        order, _ = by_label(coded, rng)
        owners = np.full(shards + 1, -1, np.int32)  # the last is for the rows that fill no shard
        owners[rng.permutation(shards)[: counts.sum()]] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        clients = placed(order, owners[np.minimum(np.arange(table.num_rows) // size, shards)])
        return Assignment(clients, numbered(self.clients), category=coded.texts())

    def _cut(self, rows: int) -> tuple[int, int, NDArray[np.int64]]:
        """The rows of a shard, how many shards there are, and how many each client gets."""
        wanted = self.clients * (self.shards or 1)
        size = self.shard_rows or max(rows // wanted, 1)
        shards = -(-rows // size) if self.keep_rest else rows // size
        if shards < wanted:
            raise DataError(
                f"data.partition asks for {wanted} shards ({self.clients} clients, {self.shards or 1} each or more), "
                f"but {rows} distinct rows make only {shards} of {size} rows: ask for fewer clients or shards, "
                "or for smaller ones"
            )
        if self.shards is None:
            return size, shards, even(shards, self.clients)
        return size, shards, np.full(self.clients, self.shards)
