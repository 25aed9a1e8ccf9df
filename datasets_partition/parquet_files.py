"""The source for rows in Parquet: one file, or a folder of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from datasets_partition.bad_rows import BadRows, OnBadRow
from datasets_partition.conversion import ROWS_PER_BATCH, Conversion
from datasets_partition.source_files import SourceFile, fingerprint, first_line, source_files
from datasets_partition.types import OnRows, Rows, ignore

SUFFIXES = (".parquet",)


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """The rows of one Parquet file, or of a folder of them.

    `columns` says what the file calls a column: {prompt = "question"}.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"

    def fingerprint(self) -> str:
        """What the rows depend on beside this section: the files' content."""
        return fingerprint(source_files(self.path, SUFFIXES))

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in the files' order. Raises ValueError, with the row's number, for what is no row."""
        conversion = Conversion(self.columns, BadRows(self.on_bad_row), on_rows)
        for file in source_files(self.path, SUFFIXES):
            conversion.add_batches(_batches(file), file.name)
        return conversion.rows(self.path)


def _batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    with file.opened() as stream:
        try:
            yield from pq.ParquetFile(stream).iter_batches(ROWS_PER_BATCH)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file.name} is not a whole Parquet file ({first_line(error)}): fetch or write it again"
            ) from None
