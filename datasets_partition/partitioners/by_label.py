"""The partitions by label: sorted pieces, a few labels a client, given shares, and shares from a Dirichlet law."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core import dealing, draws
from datasets_partition.core.columns import Coded, labels
from datasets_partition.core.types import Assignment, DataError

TRIES = 20  # more are not worth their time: a try over a million clients takes seconds
BLOCK = 1 << 22  # random numbers in one block of clients: memory does not grow with clients times labels


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
        dealing.at_least(1, clients=self.clients, shards=self.shards, shard_rows=self.shard_rows)
        if self.shards is None and self.shard_rows is None:
            raise DataError("data.partition needs shards (how many a client gets), shard_rows, or both: give one")
        if self.keep_rest and self.shards is not None:
            raise DataError("data.partition.keep_rest goes with shard_rows alone: leave out keep_rest or shards")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if a row has no label, or there are fewer shards than asked for."""
        coded = labels(table, "data.partition.label", self.label)
        dealing.enough_rows(self.clients, table.num_rows)
        wanted, rows = self.clients * (self.shards or 1), table.num_rows
        size = self.shard_rows or max(rows // wanted, 1)
        shards = -(-rows // size) if self.keep_rest else rows // size
        if shards < wanted:
            raise DataError(
                f"data.partition asks for {wanted} shards ({self.clients} clients, {self.shards or 1} each or more), "
                f"but {rows} distinct rows make only {shards} of {size} rows: ask for fewer clients or shards, "
                "or for smaller ones"
            )
        counts = dealing.even(shards if self.shards is None else wanted, self.clients)
        order, _ = dealing.by_label(coded, rng)
        owners = np.full(shards + 1, -1, np.int32)  # the last is for the rows that fill no shard
        owners[rng.permutation(shards)[: counts.sum()]] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        clients = dealing.placed(order, owners[np.minimum(np.arange(rows) // size, shards)])
        return Assignment(clients, dealing.numbered(self.clients), category=coded.texts())


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
        dealing.at_least(1, clients=self.clients, classes=self.classes)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError for too few labels, and for a label with fewer rows than clients."""
        coded = labels(table, "data.partition.label", self.label)
        dealing.enough_rows(self.clients, table.num_rows)
        if self.classes > len(coded.values):
            raise DataError(
                f"data.partition.classes is {self.classes}, but {self.label!r} has only {len(coded.values)} "
                f"values: ask for {len(coded.values)} or fewer"
            )
        order, label_rows = dealing.by_label(coded, rng)
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
        owners = np.repeat(part_client, size + (dealing.positions(holders) < rest))
        held = np.repeat(holders > 0, label_rows)
        clients = dealing.placed(np.append(order[held], order[~held]), owners)
        return Assignment(clients, dealing.numbered(self.clients), category=coded.texts())

    def _chosen(self, values: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The labels of each client, a row for each."""
        if self.mode == "deterministic":
            return (np.arange(self.clients)[:, None] + np.arange(self.classes)) % values
        blocks = []
        step = max(BLOCK // values, 1)
        for clients in np.split(np.arange(self.clients), range(step, self.clients, step)):
            drawn = rng.random((len(clients), values))
            if self.mode == "first_deterministic":
                drawn[np.arange(len(clients)), clients % values] = -1.0
            blocks.append(np.argsort(drawn, axis=1, kind="stable")[:, : self.classes])
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
                raise DataError(f"data.partition.shares of {value!r} is {list(row)}: give none below 0 and one above 0")
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
        order, label_rows = dealing.by_label(coded, rng)
        shares = [np.array(self.shares[value], dtype=np.float64) for value in values]
        counts = np.stack([*map(dealing.shared_out, label_rows.tolist(), shares)])
        if not (totals := counts.sum(axis=0)).all():
            raise DataError(
                f"data.partition.shares gives client {int(np.argmin(totals))} less than a row of each label: "
                "raise its shares"
            )
        everyone = np.tile(np.arange(len(totals), dtype=np.int32), len(values))
        clients = dealing.placed(order, np.repeat(everyone, counts.ravel()))
        return Assignment(clients, dealing.numbered(len(totals)), category=coded.texts())


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """The rows of each value of `label`, divided over `clients` clients in proportions drawn from Dirichlet(`alpha`).

    A small `alpha` gives a label to few clients; several numbers are one for each client, whose share grows with its
    number. With `balanced`, clients with more rows than the mean get none of the labels that follow. Proportions are
    drawn again until each client has `min_rows` rows; with `min_rows = 0` a client without rows is left out.
    Yurochkin et al. 2019 (arXiv 1905.12022, section 4). Cuts are unbiased; flwr-datasets' DirichletPartitioner rounds
    each down and so favors the last client.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    label: str
    clients: int
    alpha: float | tuple[float, ...] = 0.5
    min_rows: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        dealing.at_least(1, clients=self.clients)
        dealing.above_zero(alpha=self.alpha)
        dealing.single_or_each("alpha", self.alpha, self.clients, "client")
        dealing.at_least(0, min_rows=self.min_rows)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if the column has no label in a row, or `min_rows` is not reached."""
        return self.divide(labels(table, "data.partition.label", self.label), rng)

    def divide(self, coded: Coded, rng: np.random.Generator) -> Assignment:
        """Divides rows whose labels are known already. Raises DataError if `min_rows` is not reached."""
        dealing.enough_rows(self.clients, len(coded.codes), self.min_rows)
        order, label_rows = dealing.by_label(coded, rng)
        best = -1
        for _ in range(TRIES):
            owners, smallest = self._draw(label_rows, rng)
            if smallest >= self.min_rows:
                clients, names = dealing.listed(dealing.placed(order, owners), dealing.numbered(self.clients))
                return Assignment(clients, names, category=coded.texts())
            best = max(best, smallest)
        leaves = "" if best else " (which leaves clients without rows out)"
        raise DataError(
            f"data.partition.min_rows is {self.min_rows}, but in {TRIES} tries with alpha = {self.alpha} the smallest "
            f"of {self.clients} clients had {best} rows at best: lower min_rows to {best}{leaves}, raise alpha, or ask "
            f"for fewer clients"
        )

    def _draw(self, label_rows: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int32], int]:
        """The owners of the rows, label after label, and the number of rows of the smallest client."""
        everyone = np.arange(self.clients, dtype=np.int32)
        totals = np.zeros(self.clients, np.int64)
        parts = []
        for rows in label_rows.tolist():
            logs = draws.log_gamma(rng, self.alpha, self.clients)
            if self.balanced:
                logs[totals * self.clients > label_rows.sum()] = -np.inf
            counts = dealing.shared_out(rows, draws.exp(logs - logs.max()), rng.random())
            totals += counts
            parts.append(np.repeat(everyone, counts))
        return np.concatenate(parts), int(totals.min())


@dataclass(frozen=True, kw_only=True)
class InnerDirichlet:
    """Each client draws a mixture of the values of `label` from Dirichlet(`alpha`), then its rows by that mixture.

    Clients take rows one at a time, in random turns, until they have as many as `sizes` says, or equal shares of all
    rows. A label without rows left is taken out of every mixture. Several numbers as `alpha` are one for each label.
    Acar et al. 2021 (arXiv 2111.04263) and flwr-datasets' InnerDirichletPartitioner.
    """

    kind: Literal["inner_dirichlet"] = "inner_dirichlet"
    label: str
    clients: int | None = None
    sizes: tuple[int, ...] | None = None
    alpha: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        if (self.clients is None) == (not self.sizes):
            raise DataError("data.partition needs either clients or sizes: give one of them")
        dealing.at_least(1, clients=self.clients, sizes=min(self.sizes or (1,)))
        dealing.above_zero(alpha=self.alpha)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if a row has no label, or there are too few rows."""
        coded = labels(table, "data.partition.label", self.label)
        if self.sizes:
            sizes = dealing.given_sizes(self.sizes, table.num_rows)
        else:
            assert self.clients is not None
            dealing.enough_rows(self.clients, table.num_rows)
            sizes = dealing.even(table.num_rows, self.clients)
        order, label_rows = dealing.by_label(coded, rng)
        dealing.single_or_each("alpha", self.alpha, len(label_rows), "label")
        logs = draws.log_gamma(rng, self.alpha, len(sizes) * len(label_rows)).reshape(len(sizes), -1)
        turns = _turns(sizes, rng)
        drawn = _drawn(logs, label_rows, turns, rng)
        clients = np.full(table.num_rows, -1, np.int32)
        taken = np.bincount(drawn, minlength=len(label_rows))
        starts = np.cumsum(label_rows) - label_rows
        clients[order[np.repeat(starts, taken) + dealing.positions(taken)]] = turns[np.argsort(drawn, kind="stable")]
        return Assignment(clients, dealing.numbered(len(sizes)), category=coded.texts())


def _turns(sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int32]:
    """The client of each turn, any that is not full: the order in which Poisson clocks ring, one a client."""
    clients = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rings = np.cumsum(-draws.log(1 - rng.random(len(clients))))
    before = np.append(0.0, rings)[np.cumsum(sizes) - sizes]
    turns: NDArray[np.int32] = clients[np.argsort(rings - before[clients], kind="stable")]
    return turns


def _drawn(
    logs: NDArray[np.float64], label_rows: NDArray[np.int64], turns: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.uint32]:
    """The label drawn at each turn, where no label is drawn more often than it has rows.

    All turns are drawn at once. The label that runs out first has its later draws drawn again without it; later draws
    of other labels stand, since on the condition that they are others they follow the mixture without it already.
    """
    is_open = np.ones(len(label_rows), np.bool_)
    drawn = _by_mixture(logs, is_open, turns, rng)
    while True:
        by_label = np.argsort(drawn, kind="stable")
        counts = np.bincount(drawn, minlength=len(label_rows))
        starts = np.cumsum(counts) - counts
        over = np.flatnonzero(counts > label_rows)
        if not len(over):
            return drawn
        first = over[np.argmin(by_label[starts[over] + label_rows[over]])]
        again = by_label[starts[first] + label_rows[first] : starts[first] + counts[first]]
        is_open[first] = False
        drawn[again] = _by_mixture(logs, is_open, turns[again], rng)


def _by_mixture(
    logs: NDArray[np.float64], is_open: NDArray[np.bool_], turns: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.uint32]:
    involved, rows = np.unique(turns, return_inverse=True)
    edges = np.empty((len(involved), len(is_open)))
    step = max(1, draws.BLOCK // len(is_open))  # clients in a block: the exponential takes several times their memory
    for first in range(0, len(involved), step):
        some = np.where(is_open, logs[involved[first : first + step]], -np.inf)
        weights = draws.exp((some - some.max(axis=1, keepdims=True)).ravel()).reshape(some.shape)
        np.cumsum(weights, axis=1, out=edges[first : first + step])
    points = rng.random(len(turns)) * edges[rows, -1]
    drawn = np.zeros(len(turns), np.uint32)
    for label in range(len(is_open) - 1):
        drawn += points >= edges[rows, label]
    return np.minimum(drawn, np.uint32(np.flatnonzero(is_open)[-1]))  # a product may round up to the last edge
