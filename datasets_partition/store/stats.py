"""How unevenly rows are spread over clients; the server's rows are counted apart, and no row's text is read."""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datasets_partition.store.sealed import readable
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens, row_lengths


@dataclass(frozen=True)
class Sizes:
    """The rows or tokens of each client, by id."""

    each: NDArray[np.int64]

    @property
    def total(self) -> int:
        """The sum over all clients."""
        return int(self.each.sum())

    @property
    def least(self) -> int:
        """The smallest client's."""
        return int(self.each.min())

    @property
    def median(self) -> float:
        """The median client's."""
        return float(np.median(self.each))

    @property
    def most(self) -> int:
        """The largest client's."""
        return int(self.each.max())

    @cached_property
    def gini(self) -> float:
        """The Gini coefficient: half the mean absolute difference of two clients, over the mean (Gini 1912).

        Over ascending x: sum_i (2 i - n - 1) x_i / (n sum_i x_i), i = 1 ... n, from 0 (all the same) to 1 - 1/n.
        """
        ordered, n = np.sort(self.each).astype(np.float64), len(self.each)
        ranks = 2 * np.arange(1, n + 1) - n - 1
        return float(ranks @ ordered / (n * ordered.sum())) if self.total else 0.0


@dataclass(frozen=True)
class Categories:
    """Rows by client and category: a cell for each pair that has any, by client; `codes` are positions in `names`."""

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
        """The label divergence: the distance of a client's mixture p of categories from that of all clients, q.

        The Jensen-Shannon divergence to base 2 (Lin 1991, "Divergence measures based on the Shannon entropy"),
        (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, averaged over rows: 0 for equal mixtures, near 1 for disjoint.
        """
        rows = np.bincount(self.clients, self.counts)[self.clients]
        p, q = self.counts / rows, (self.totals / self.totals.sum())[self.codes]
        # A category that the client lacks adds q log2(q / (q / 2)) = q, and all q add up to 1: a client's sum over all
        # categories is 1 + sum over its cells of (p log2(p / m) + q log2(q / m) - q).
        cells = p * np.log2(2 * p / (p + q)) + q * np.log2(2 * q / (p + q)) - q
        mean = (1 + rows @ cells / self.totals.sum()) / 2
        return float(np.clip(mean, 0, 1))  # rounding may leave the interval


@dataclass(frozen=True)
class TokenLengths:
    """Tokens of each row and of each client, and the number of rows that the objective dropped; rows are cut."""

    rows: NDArray[np.int32]
    clients: Sizes
    dropped: int

    @classmethod
    def of(cls, store: Store, tokens: Tokens) -> "TokenLengths":
        """Counts the tokens of the clients' rows, which the record batches hold in the order of the clients."""
        kept = (tokens.counts("train").astype(np.int64) + tokens.counts("heldout"))[: store.num_clients]
        with readable(tokens.folder):
            rows = row_lengths(tokens.batches.read_all())[: kept.sum()]
        until = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        ends = np.cumsum(kept)
        dropped = sum(int(tokens.dropped(split)[: store.num_clients].sum()) for split in ("train", "heldout"))
        return cls(rows, Sizes(until[ends] - until[ends - kept]), dropped)


@dataclass(frozen=True)
class Skew:
    """Everything that is counted about a store: `rows` are all rows of each client, unseen clients' too.

    `prompts` is the number of different prompts, of a store that keeps the rows of a prompt together.
    """

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
    prompts: int | None = None

    @classmethod
    def of(cls, store: Store) -> "Skew":
        """Counts the rows and clients of `store`."""
        train, heldout = store.counts("train").astype(np.int64), store.counts("heldout").astype(np.int64)
        rows = (train + heldout)[: store.num_clients]
        counted = {field.name for field in fields(cls)} & store.manifest.keys() - {"rows"}
        return cls(
            training_clients=store.num_training,
            train_rows=int(train.sum()),
            heldout_rows=int(heldout[: store.num_training].sum()),
            unseen_rows=int(rows[store.num_training :].sum()),
            rows=Sizes(rows),
            categories=_categories(store, rows),
            **{name: store.manifest[name] for name in counted},
        )


def _categories(store: Store, rows: NDArray[np.int64]) -> Categories | None:
    """Counts the column `category` by its dictionary codes in Parquet; None where there is no such column."""
    path = store.folder / "rows.parquet"
    options = {"memory_map": True, "read_dictionary": ["category"], "page_checksum_verification": True}
    with readable(store.folder):
        if "category" not in pq.read_schema(path, memory_map=True).names:
            return None
        with pq.ParquetFile(path, **options) as file:
            values = file.read(columns=["category"])["category"].slice(0, rows.sum())
    values = values.cast(pa.dictionary(pa.int32(), pa.string())).combine_chunks()
    codes, names = values.indices.to_numpy().astype(np.int64), values.dictionary.to_pylist()
    pairs, counts = np.unique(np.repeat(np.arange(len(rows)), rows) * len(names) + codes, return_counts=True)
    return Categories(names, pairs // len(names), pairs % len(names), counts)
