"""The even partition: every client's rows are drawn from the same distribution."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from datasets_partition.core.dealing import at_least, dealt, enough_rows, even, numbered
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Rows dealt at random to `clients` clients, whose row counts differ by at most 1.

    The sizes are those of flwr-datasets' IidPartitioner, which leaves the rows in the source's order.
    """

    kind: Literal["iid"] = "iid"
    clients: int

    def __post_init__(self) -> None:
        """Raises DataError for fewer than one client."""
        at_least(1, clients=self.clients)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if there are more clients than rows."""
        enough_rows(self.clients, table.num_rows)
        order = rng.permutation(table.num_rows)
        return Assignment(dealt(order, even(table.num_rows, self.clients)), numbered(self.clients))
