"""The partitions by size alone: clients with equal, uneven or limited numbers of rows, all of the same distribution."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core import dealing, draws
from datasets_partition.core.types import Assignment, DataError


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Rows dealt at random to `clients` clients of equal size; flwr-datasets' IidPartitioner keeps their order."""

    kind: Literal["iid"] = "iid"
    clients: int

    def __post_init__(self) -> None:
        dealing.at_least(1, clients=self.clients)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if there are more clients than rows."""
        dealing.enough_rows(self.clients, table.num_rows)
        counts = dealing.even(table.num_rows, self.clients)
        return Assignment(dealing.dealt(rng.permutation(table.num_rows), counts), dealing.numbered(self.clients))


@dataclass(frozen=True, kw_only=True)
class SizeCap:
    """As few clients as can be with at most `rows` rows each, in the source's order and as even as can be (`split`).

    With `surplus = "drop"`, one client with `rows` rows drawn at random. Most useful as the second part of `Combined`.
    """

    kind: Literal["size_cap"] = "size_cap"
    rows: int
    surplus: Literal["split", "drop"] = "split"

    def __post_init__(self) -> None:
        dealing.at_least(1, rows=self.rows)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Cuts the table, or draws from it."""
        rows, drops = table.num_rows, self.surplus == "drop"
        order = rng.permutation(rows) if drops and rows > self.rows else np.arange(rows)
        counts = np.array([min(rows, self.rows)]) if drops else dealing.even(rows, -(-rows // self.rows))
        return Assignment(dealing.dealt(order, counts), dealing.numbered(len(counts)))


@dataclass(frozen=True, kw_only=True)
class BySize:
    """Rows dealt at random to clients whose sizes follow `law`, or are `sizes`; rows beyond these are nobody's.

    Client i of 1, 2, ... has a share like i (linear), i^2 (square) or e^i (exponential), rounded down, the last also
    the rest: flwr-datasets' LinearPartitioner, SquarePartitioner and ExponentialPartitioner, or SizePartitioner. Others
    give a row to each, then shares like exp(`sigma` x), x standard normal (lognormal), or from Dirichlet(`alpha`).
    """

    kind: Literal["size"] = "size"
    clients: int | None = None
    law: Literal["linear", "square", "exponential", "lognormal", "dirichlet"] | None = None
    sigma: float = 1.0
    alpha: float = 0.5
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None:
            if self.clients is not None or self.law is not None:
                raise DataError("data.partition.sizes is given with clients or law: leave these out, or sizes")
            if not self.sizes:
                raise DataError("data.partition.sizes is empty: give the number of rows of each client")
            dealing.at_least(1, sizes=min(self.sizes))
        elif self.clients is None or self.law is None:
            raise DataError("data.partition needs clients and law, or sizes: give the one or the other")
        dealing.at_least(1, clients=self.clients)
        dealing.above_zero(sigma=self.sigma, alpha=self.alpha)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if there are too few rows for each client to have one, or for the given sizes."""
        rows = table.num_rows
        counts = dealing.given_sizes(self.sizes, rows) if self.sizes else self._counts(rows, rng)
        return Assignment(dealing.dealt(rng.permutation(rows), counts), dealing.numbered(len(counts)))

    def _counts(self, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The rows of each client by the law."""
        assert self.clients is not None
        clients = self.clients
        dealing.enough_rows(clients, rows)
        if self.law in ("lognormal", "dirichlet"):
            is_normal = self.law == "lognormal"
            logs = self.sigma * draws.normal(rng, clients) if is_normal else draws.log_gamma(rng, self.alpha, clients)
            return 1 + dealing.shared_out(rows - clients, draws.exp(logs - logs.max()))
        counts = self._rising(clients, rows)
        if not counts[0]:
            most = bisect_left(range(1, clients), True, key=lambda fewer: not self._rising(fewer, rows)[0])
            raise DataError(
                f'data.partition.clients is {clients}, but with law = "{self.law}" the first of them would have none '
                f"of the {rows} rows: ask for {most} clients or fewer"
            )
        return counts

    def _rising(self, clients: int, rows: int) -> NDArray[np.int64]:
        number = np.arange(1, clients + 1, dtype=np.float64)
        units = draws.exp(number - clients) if self.law == "exponential" else number
        units = number * number if self.law == "square" else units
        counts: NDArray[np.int64] = (units / units.sum() * rows).astype(np.int64)
        counts[-1] += rows - counts.sum()
        return counts
