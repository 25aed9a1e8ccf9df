"""No client with more than so many rows: as it is for the whole table, and most of use as the second of `Combined`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from datasets_partition.core.dealing import at_least, dealt, even, numbered
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class SizeCap:
    """Clients of at most `rows` rows: as few as can be in the source's order, equal but for a row (`split`).

    With `surplus = "drop"`, one client with `rows` rows drawn at random; the others are nobody's.
    """

    kind: Literal["size_cap"] = "size_cap"
    rows: int
    surplus: Literal["split", "drop"] = "split"

    def __post_init__(self) -> None:
        """Raises ValueError for fewer than one row."""
        at_least("rows", self.rows, 1)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises nothing."""
        if self.surplus == "split":
            counts = even(table.num_rows, -(-table.num_rows // self.rows))
            return Assignment(dealt(np.arange(table.num_rows), counts), numbered(len(counts)))
        order = rng.permutation(table.num_rows) if table.num_rows > self.rows else np.arange(table.num_rows)
        return Assignment(dealt(order, np.array([min(table.num_rows, self.rows)])), numbered(1))
