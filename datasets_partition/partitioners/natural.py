"""The natural partition: the author of a row owns it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from datasets_partition.core.columns import keys
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class Natural:
    """A client for each value of the column `key`, in the order of their names.

    flwr-datasets' NaturalIdPartitioner, except that numbers too are in the order of their text.
    """

    kind: Literal["natural"] = "natural"
    key: str = "client"

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Uses no randomness. Raises DataError if the column is missing, or a value of it is null or empty."""
        return Assignment(*keys(table, "data.partition.key", self.key))
