"""The source for rows in Parquet: one file, or a folder of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from datasets_partition.core.types import OnRows, Rows, ignore
from datasets_partition.formats.bad_rows import BadRows, OnBadRow
from datasets_partition.formats.conversion import ROWS_PER_BATCH, Conversion
from datasets_partition.sources.source_files import SourceFile, fingerprint, first_line, source_files

SUFFIXES = (".parquet",)
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """The rows of one Parquet file, or of a folder of them; a subfolder `x=1` is a column x of its rows, as text.

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
            conversion.add_batches((_with_keys(batch, file) for batch in _batches(file)), file.name)
        return conversion.rows(self.path)


def _with_keys(batch: pa.RecordBatch, file: SourceFile) -> pa.RecordBatch:
    """The rows with the columns that the names of the file's folders hold, as Hive and Spark write them."""
    for folder in PurePosixPath(file.relative).parts[:-1]:
        name, equals, value = folder.partition("=")
        if equals and name not in batch.schema.names:
            text = None if value == NO_VALUE else unquote(value)
            batch = batch.append_column(name, pa.repeat(pa.scalar(text, pa.string()), len(batch)))
    return batch


def _batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    with file.opened() as stream:
        try:
            yield from pq.ParquetFile(stream).iter_batches(ROWS_PER_BATCH)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
            raise ValueError(
                f"{file.name} is not a whole Parquet file ({first_line(error)}): fetch or write it again"
            ) from None
