"""The source for rows in Parquet: one file, or a folder of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from datasets_partition.core.types import OnRows, Rows, ignore
from datasets_partition.formats.bad_rows import OnBadRow
from datasets_partition.formats.conversion import ROWS_PER_BATCH, Conversion
from datasets_partition.sources.source_files import SourceFile, fingerprint, source_files

SUFFIXES = (".parquet",)
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """The rows of one Parquet file, or of a folder of them; a subfolder `x=1` is a column x of its rows, as text.

    `columns` gives a column's name in the file: {prompt = "question"}.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"

    def fingerprint(self) -> str:
        """A hash of the files' content."""
        return fingerprint(source_files(self.path, SUFFIXES))

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in the files' order. Raises DataError, with the row's number, for a bad row."""
        conversion = Conversion(self.columns, self.on_bad_row, on_rows)
        for file in source_files(self.path, SUFFIXES):
            conversion.add_batches(_batches(file), file.name)
        return conversion.rows(self.path)


def _batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    errors = pa.ArrowException, OSError, UnicodeDecodeError  # the last is raised for a column's name
    with file.opened() as stream, file.whole("Parquet", "fetch or write it", *errors):
        for batch in pq.ParquetFile(stream).iter_batches(ROWS_PER_BATCH):
            yield _with_keys(batch, file)


def _with_keys(batch: pa.RecordBatch, file: SourceFile) -> pa.RecordBatch:
    """The rows with the columns that the names of the file's folders hold, as Hive and Spark write them."""
    for folder in PurePosixPath(file.relative).parts[:-1]:
        name, equals, value = folder.partition("=")
        if equals and name not in batch.schema.names:
            text = None if value == NO_VALUE else unquote(value)
            batch = batch.append_column(name, pa.repeat(pa.scalar(text, pa.string()), len(batch)))
    return batch
