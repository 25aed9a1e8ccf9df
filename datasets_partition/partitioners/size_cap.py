"""Clients with a limit on their rows: of the whole table, and most useful as the second partition of `Combined`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from datasets_partition.core.dealing import at_least, dealt, even, numbered
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class SizeCap:
    """As few clients as can be with at most `rows` rows each, in the source's order and as even as can be (`split`).

    With `surplus = "drop"`, one client with `rows` rows drawn at random; the other rows are nobody's.
    """

    kind: Literal["size_cap"] = "size_cap"
    rows: int
    surplus: Literal["split", "drop"] = "split"

    def __post_init__(self) -> None:
        """Raises DataError for fewer than one row."""
        at_least(1, rows=self.rows)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Cuts the table, or draws from it."""
        if self.surplus == "split":
            counts = even(table.num_rows, -(-table.num_rows // self.rows))
            return Assignment(dealt(np.arange(table.num_rows), counts), numbered(len(counts)))
        order = rng.permutation(table.num_rows) if table.num_rows > self.rows else np.arange(table.num_rows)
        return Assignment(dealt(order, np.array([min(table.num_rows, self.rows)])), numbered(1))
