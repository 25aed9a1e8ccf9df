"""The partitions by label: pieces of the sorted rows, a few labels for each client, or shares that the recipe gives."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import (
    at_least,
    by_label,
    enough_rows,
    even,
    numbered,
    placed,
    positions,
    shared_out,
)
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment

# Random numbers in one block of clients, so that memory does not grow with clients times labels.
BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Rows sorted by `label` and cut into shards, of which each client gets `shards` at random.

    Shards have `shard_rows` rows, or as many as there can be. With `shard_rows` alone, all are dealt, one more to the
    first clients where they do not divide; rows that fill no shard are nobody's, or with `keep_rest` one more shard.
    McMahan et al. 2017 (arXiv 1602.05629, section 3) and flwr-datasets' ShardPartitioner.
    """

    kind: Literal["shards"] = "shards"
    label: str
    clients: int
    shards: int | None = None
    shard_rows: int | None = None
    keep_rest: bool = False

    def __post_init__(self) -> None:
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
        return size, shards, even(shards if self.shards is None else wanted, self.clients)


@dataclass(frozen=True, kw_only=True)
class Pathological:
    """Each client has `classes` values of `label`; a value's rows are divided evenly over the clients that have it.

    `mode` says which values: `random`; `deterministic`: client i has the values i, i + 1, ... in sorted order, starting
    over at the end; `first_deterministic`: client i has the value i, others at random. Other values are nobody's.
    Li et al. 2021 (arXiv 2102.02079, section 4.1), who fix the first value, and flwr-datasets' PathologicalPartitioner.
    """

    kind: Literal["pathological"] = "pathological"
    label: str
    clients: int
    classes: int = 2
    mode: Literal["random", "deterministic", "first_deterministic"] = "random"

    def __post_init__(self) -> None:
        at_least(1, clients=self.clients, classes=self.classes)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError for too few labels, and for a label with fewer rows than clients."""
        coded = labels(table, "data.partition.label", self.label)
        enough_rows(self.clients, table.num_rows)
        if self.classes > len(coded.values):
            raise DataError(
                f"data.partition.classes is {self.classes}, but {self.label!r} has only {len(coded.values)} "
                f"values: ask for {len(coded.values)} or fewer"
            )
        order, label_rows = by_label(coded, rng)
        chosen = self._chosen(len(label_rows), rng)

        # A part for each label of each client, label after label.
        by_part_label = np.argsort(chosen.ravel(), kind="stable")
        part_label = chosen.ravel()[by_part_label]
        part_client = (by_part_label // self.classes).astype(np.int32)
        holders = np.bincount(part_label, minlength=len(label_rows))
        if (label_rows < holders).any():
            short = int(np.argmax(holders - label_rows))
            raise DataError(
                f"data.partition gives the label {coded.values[short].as_py()!r} to {holders[short]} clients, but it "
                f"has only {label_rows[short]} rows: ask for fewer clients or classes, or leave this label out of the "
                "source"
            )
        size, rest = np.divmod(label_rows[part_label], holders[part_label])
        owners = np.repeat(part_client, size + (positions(holders) < rest))
        held = np.repeat(holders > 0, label_rows)
        clients = placed(np.append(order[held], order[~held]), owners)
        return Assignment(clients, numbered(self.clients), category=coded.texts())

    def _chosen(self, values: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The labels of each client, a row for each."""
        if self.mode == "deterministic":
            return (np.arange(self.clients)[:, None] + np.arange(self.classes)) % values
        blocks = []
        step = max(BLOCK // values, 1)
        for first in range(0, self.clients, step):
            clients = np.arange(first, min(first + step, self.clients))
            draws = rng.random((len(clients), values))
            if self.mode == "first_deterministic":
                draws[np.arange(len(clients)), clients % values] = -1.0
            blocks.append(np.argsort(draws, axis=1, kind="stable")[:, : self.classes])
        return np.concatenate(blocks)


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """For each value of `label`, the shares of its rows that the clients get, one number a client.

    Only the proportions within a label count, so shares may also be numbers of rows. Each share is met to less than a
    row; flwr-datasets' DistributionPartitioner rounds shares down and gives the rest of a label to one client.
    """

    kind: Literal["distribution"] = "distribution"
    label: str
    shares: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if not self.shares:
            raise DataError("data.partition.shares is empty: give each label a list with one share a client")
        if len({len(row) for row in self.shares.values()}) > 1:
            raise DataError("data.partition.shares has lists of different lengths: give one share a client for each")
        for value, row in self.shares.items():
            if not all(0 <= share < float("inf") for share in row) or not any(row):
                raise DataError(
                    f"data.partition.shares of {value!r} is {list(row)}: give numbers from 0 up, and one above 0"
                )
        for client, shares in enumerate(zip(*self.shares.values(), strict=True)):
            if not any(shares):
                raise DataError(f"data.partition.shares gives client {client} nothing: give it a share, or take it out")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if rows and shares differ in their labels, or a client's shares round to no row."""
        coded = labels(table, "data.partition.label", self.label)
        values = coded.values.to_pylist()
        if missing := [value for value in values if value not in self.shares]:
            raise DataError(
                f"data.partition.shares has no {missing[0]!r}, which rows have as {self.label!r}: "
                f"give shares for each of {', '.join(values)}"
            )
        if empty := [value for value in self.shares if value not in values]:
            raise DataError(
                f"data.partition.shares has {empty[0]!r}, which no row has as {self.label!r}: take it out, "
                f"there are {', '.join(values)}"
            )
        order, label_rows = by_label(coded, rng)
        shares = (np.array(self.shares[value], dtype=np.float64) for value in values)
        counts = np.stack([shared_out(rows, row) for rows, row in zip(label_rows.tolist(), shares, strict=True)])
        if not (totals := counts.sum(axis=0)).all():
            raise DataError(
                f"data.partition.shares gives client {int(np.argmin(totals))} less than a row of each label: "
                "raise its shares"
            )
        everyone = np.tile(np.arange(len(totals), dtype=np.int32), len(values))
        clients = placed(order, np.repeat(everyone, counts.ravel()))
        return Assignment(clients, numbered(len(totals)), category=coded.texts())
