"""What the reference model says of each row, beside the token columns. Legend: R rows, G sequences of a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from datasets_partition.store.store import SplitName


@dataclass(frozen=True)
class RowColumn:
    """A column of all clients' rows: of each client its training rows, then its held-out rows, from `starts_N` on."""

    name: str
    starts_N: np.ndarray
    train_N: np.ndarray  # the number of each client's training rows
    values_RG: np.ndarray

    @classmethod
    def of(
        cls, name: str, parts: Sequence[tuple[int, np.ndarray]], train_N: np.ndarray, heldout_N: np.ndarray
    ) -> "RowColumn":
        """Puts the values (rows, G) of each client in place."""
        rows_N = train_N.astype(np.int64) + heldout_N
        ordered = [values for _, values in sorted(parts, key=lambda part: part[0])]
        assert [len(values) for values in ordered] == rows_N.tolist(), "a client's rows are missing"
        ordered = [values for values in ordered if len(values)]
        return cls(name, np.cumsum(rows_N) - rows_N, train_N, np.concatenate(ordered))

    def beside(self, rows: pa.RecordBatch, client: int, split: SplitName) -> pa.RecordBatch:
        """Returns a client's rows with the column, over the same memory."""
        first = self.starts_N[client] + (self.train_N[client] if split == "heldout" else 0)
        values_RG = self.values_RG[first : first + rows.num_rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(values_RG.reshape(-1)), values_RG.shape[1])
        return pa.RecordBatch.from_arrays([*rows.columns, column], [*rows.schema.names, self.name])
