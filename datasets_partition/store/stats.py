"""How unevenly a store's rows are spread over its clients, in numbers: sizes, categories, token lengths.

Reads the index, one column of rows.parquet and the offsets of the token columns; never a row's text. The server's own
rows are counted apart, and are part of nothing else here.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datasets_partition.store.sealed import readable
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens


@dataclass(frozen=True)
class Sizes:
    """How much each client has, by id: rows or tokens."""

    each: NDArray[np.int64]

    @property
    def total(self) -> int:
        """What all clients have together."""
        return int(self.each.sum())

    @property
    def least(self) -> int:
        """What the smallest client has."""
        return int(self.each.min())

    @property
    def median(self) -> float:
        """Half of the clients have no more than this."""
        return float(np.median(self.each))

    @property
    def most(self) -> int:
        """What the largest client has."""
        return int(self.each.max())

    @cached_property
    def gini(self) -> float:
        """The Gini coefficient: half the mean absolute difference of two clients, over the mean (Gini 1912).

        Over sizes x in ascending order it is sum_i (2 i - n - 1) x_i / (n sum_i x_i), with i from 1 to n: 0 where all
        are the same, 1 - 1/n where one client has everything.
        """
        ordered, n = np.sort(self.each).astype(np.float64), len(self.each)
        ranks = 2 * np.arange(1, n + 1) - n - 1
        return float(ranks @ ordered / (n * ordered.sum())) if self.total else 0.0


@dataclass(frozen=True)
class Categories:
    """How many rows of each category each client has: a cell for each pair that has any, in the order of the clients.

    A category is what the partition went by, a label or a topic; `codes` are positions in `names`.
    """

    names: list[str]
    clients: NDArray[np.int64]
    codes: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def totals(self) -> NDArray[np.int64]:
        """Rows of each category, by code."""
        return np.bincount(self.codes, self.counts, minlength=len(self.names)).astype(np.int64)

    @cached_property
    def divergence(self) -> float:
        """The label divergence: how far a client's mixture p of categories is from everybody's, q.

        It is the Jensen-Shannon divergence to base 2 (Lin 1991, "Divergence measures based on the Shannon entropy"),
        (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, as the mean over the clients, weighted by their rows. It is 0
        where all clients have the same mixture and comes near 1 where each of many has categories of its own.
        """
        rows = np.bincount(self.clients, self.counts)[self.clients]
        p, q = self.counts / rows, (self.totals / self.totals.sum())[self.codes]
        # A category that the client lacks adds q log2(q / (q / 2)) = q, and all q together are 1: a client's sum over
        # all categories is 1 + sum over its own cells of (p log2(p / m) + q log2(q / m) - q).
        cells = p * np.log2(2 * p / (p + q)) + q * np.log2(2 * q / (p + q)) - q
        mean = (1 + rows @ cells / self.totals.sum()) / 2
        return float(np.clip(mean, 0, 1))  # past its ends by rounding only


@dataclass(frozen=True)
class TokenLengths:
    """Tokens of each row, of each client, and how many rows the objective dropped; a row ends at its cut."""

    rows: NDArray[np.int32]
    clients: Sizes
    dropped: int

    @classmethod
    def of(cls, store: Store, tokens: Tokens) -> "TokenLengths":
        """Counts the tokens of the clients' rows: the record batches hold them in the order of the clients."""
        kept = (tokens.counts("train").astype(np.int64) + tokens.counts("heldout"))[: store.num_clients]
        batches = (tokens.batches.get_batch(i) for i in range(tokens.batches.num_record_batches))
        with readable(tokens.folder):
            every = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
        rows = np.concatenate(every)[: kept.sum()]
        until = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        ends = np.cumsum(kept)
        dropped = sum(int(tokens.dropped(split)[: store.num_clients].sum()) for split in ("train", "heldout"))
        return cls(rows, Sizes(until[ends] - until[ends - kept]), dropped)


@dataclass(frozen=True)
class Skew:
    """What there is to say about a store: `rows` are all rows of each client, unseen clients' too."""

    training_clients: int
    unseen_clients: int
    train_rows: int
    heldout_rows: int
    unseen_rows: int
    server_rows: int
    rows: Sizes
    categories: Categories | None
    duplicate_rows: int
    duplicate_clients: int
    skipped_rows: dict[str, int]
    left_out_clients: int
    left_out_rows: int
    unassigned_rows: int

    @classmethod
    def of(cls, store: Store) -> "Skew":
        """Counts what is in `store`."""
        clients, training = slice(store.num_clients), slice(store.num_training)
        train, heldout = store.counts("train").astype(np.int64), store.counts("heldout").astype(np.int64)
        rows = (train + heldout)[clients]
        return cls(
            training_clients=store.num_training,
            unseen_clients=store.num_clients - store.num_training,
            train_rows=int(train.sum()),
            heldout_rows=int(heldout[training].sum()),
            unseen_rows=int(rows[store.num_training :].sum()),
            server_rows=int(heldout[store.num_clients :].sum()),
            rows=Sizes(rows),
            categories=_categories(store, rows),
            duplicate_rows=store.manifest["duplicate_rows"],
            duplicate_clients=store.manifest["duplicate_clients"],
            skipped_rows=store.manifest["skipped_rows"],
            left_out_clients=store.manifest["left_out_clients"],
            left_out_rows=store.manifest["left_out_rows"],
            unassigned_rows=store.manifest["unassigned_rows"],
        )


def _categories(store: Store, rows: NDArray[np.int64]) -> Categories | None:
    """Counts the column `category`, as the numbers that Parquet keeps for its values; None where there is none."""
    path = store.folder / "rows.parquet"
    with readable(store.folder):
        if "category" not in pq.read_schema(path, memory_map=True).names:
            return None
    options = {"memory_map": True, "read_dictionary": ["category"], "page_checksum_verification": True}
    with readable(store.folder), pq.ParquetFile(path, **options) as file:
        found = file.read(columns=["category"])["category"].slice(0, rows.sum())
    found = found.cast(pa.dictionary(pa.int32(), pa.string())).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in found.chunks]).astype(np.int64)
    names = found.chunk(0).dictionary.to_pylist()
    pairs, counts = np.unique(np.repeat(np.arange(len(rows)), rows) * len(names) + codes, return_counts=True)
    return Categories(names, pairs // len(names), pairs % len(names), counts)
