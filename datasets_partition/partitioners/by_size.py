"""The partition that is skewed in size alone: some clients have many rows, some few, all of the same distribution."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core import draws
from datasets_partition.core.dealing import (
    above_zero,
    at_least,
    dealt,
    enough_rows,
    given_sizes,
    numbered,
    shared_out,
)
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class BySize:
    """Rows dealt at random to clients whose sizes follow `law`, or are `sizes`; rows beyond these are nobody's.

    Client i of 1, 2, ... has a share like i (linear), i^2 (square) or e^i (exponential), rounded down, and the last
    client has the rest as well: the sizes of flwr-datasets' LinearPartitioner, SquarePartitioner and
    ExponentialPartitioner, and with `sizes` of SizePartitioner. With lognormal, each client has one row and a share
    of the others like exp(`sigma` x), where x is a standard normal draw; with dirichlet, shares drawn from
    Dirichlet(`alpha`).
    """

    kind: Literal["size"] = "size"
    clients: int | None = None
    law: Literal["linear", "square", "exponential", "lognormal", "dirichlet"] | None = None
    sigma: float = 1.0
    alpha: float = 0.5
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises DataError unless there are either a law and a number of clients, or sizes of at least 1."""
        if self.sizes is not None:
            if self.clients is not None or self.law is not None:
                raise DataError("data.partition.sizes is given with clients or law: leave these out, or sizes")
            if not self.sizes:
                raise DataError("data.partition.sizes is empty: give the number of rows of each client")
            at_least(1, sizes=min(self.sizes))
        elif self.clients is None or self.law is None:
            raise DataError("data.partition needs clients and law, or sizes: give the one or the other")
        at_least(1, clients=self.clients)
        above_zero(sigma=self.sigma, alpha=self.alpha)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if there are too few rows for each client to have one, or for the given sizes."""
        rows = table.num_rows
        counts = given_sizes(self.sizes, rows) if self.sizes else self._counts(rows, rng)
        return Assignment(dealt(rng.permutation(rows), counts), numbered(len(counts)))

    def _counts(self, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The rows of each client by the law."""
        assert self.clients is not None
        clients = self.clients
        enough_rows(clients, rows)
        if self.law in ("lognormal", "dirichlet"):
            is_normal = self.law == "lognormal"
            logs = self.sigma * draws.normal(rng, clients) if is_normal else draws.log_gamma(rng, self.alpha, clients)
            return 1 + shared_out(rows - clients, draws.exp(logs - logs.max()))
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
        if self.law == "exponential":
            units = draws.exp(number - clients)
        else:
            units = number if self.law == "linear" else number * number
        counts: NDArray[np.int64] = (units / units.sum() * rows).astype(np.int64)
        counts[-1] += rows - counts.sum()
        return counts
