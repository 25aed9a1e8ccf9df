"""The partition by the length of texts: some clients write short rows, some long ones."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.core.columns import texts
from datasets_partition.core.dealing import at_least, numbered, text_columns
from datasets_partition.core.types import Assignment
from datasets_partition.partitioners.continuous import check_strictness, sorted_out


@dataclass(frozen=True, kw_only=True)
class ByLength:
    """Like `Continuous`, by the number of characters of each row's text: the first client has the shortest rows.

    The text is that of `columns`, or a row's whole content, such as prompt and completion.
    """

    kind: Literal["length"] = "length"
    clients: int
    columns: tuple[str, ...] | None = None
    strictness: float = 1.0

    def __post_init__(self) -> None:
        """Raises DataError for fewer than one client, no columns, or a `strictness` outside [0, 1]."""
        at_least(1, clients=self.clients)
        text_columns(self.columns, "is measured")
        check_strictness(self.strictness)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if a column is not text, all rows have one length, or there are more clients than rows."""
        lengths = np.zeros(table.num_rows)
        for text in texts(table, self.columns):
            lengths += pc.utf8_length(text).to_numpy()
        return Assignment(sorted_out(lengths, self.clients, self.strictness, rng), numbered(self.clients))
