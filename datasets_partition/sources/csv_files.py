"""The source for tables of text: CSV files with a header, plain or gzipped."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.core.errors import DataError
from datasets_partition.core.types import OnRows, Rows, ignore
from datasets_partition.formats.arrow_columns import Faults
from datasets_partition.formats.bad_rows import BadRow, OnBadRow
from datasets_partition.formats.conversion import ROWS_PER_BATCH, Conversion
from datasets_partition.sources.source_files import SourceFile, fingerprint, source_files

SUFFIXES = (".csv", ".csv.gz")
FIELD_BYTES = 2**31 - 1  # the csv module's default is 128 KiB, less than a long text
TRUE, FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")


@dataclass(frozen=True, kw_only=True)
class CsvFiles:
    """The rows of one CSV file, `.csv` or `.csv.gz`, or of a folder of them; the first line names the columns.

    All columns are text, so that the keys 007 and 7 stay apart; partitioners read numbers and times from it. Only a
    `label` that is true or false wherever it is not empty is boolean, as an unpaired preference needs it.
    `columns` gives a column's name in the file: {prompt = "question"}.
    """

    kind: Literal["csv"] = "csv"
    path: str
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"

    def fingerprint(self) -> str:
        """A hash of the files' content."""
        return fingerprint(source_files(self.path, SUFFIXES))

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in the files' order. Raises DataError, with the number of its first line, for a bad row."""
        conversion = Conversion(self.columns, self.on_bad_row, on_rows)
        label = self.columns.get("label", "" if "label" in self.columns.values() else "label")
        for file in source_files(self.path, SUFFIXES):
            parts = list(_parts(file))
            is_boolean = _is_boolean([part.batch[label] for part in parts if part.batch.schema.names.count(label) == 1])
            for part in parts:
                batch = _with_boolean(part.batch, label) if is_boolean else part.batch
                conversion.add_batch(batch, file.name, part.lines, "line", part.faults)
        return conversion.rows(self.path)


class _Part(NamedTuple):
    """Some rows of a file, the number of each row's first line, and the bad rows among them."""

    batch: pa.RecordBatch
    lines: list[int]
    faults: Faults


def _parts(file: SourceFile) -> Iterator[_Part]:
    records = _records(file)
    _, header = next(records, (0, None))
    if header is None:
        raise DataError(f"{file.name} is empty: give it a header and rows")
    if isinstance(header, BadRow):
        raise DataError(f"{file.name} has a header that {header.reason} ({header.detail}): correct it")
    if not _is_text(header):
        raise DataError(f"{file.name} is not UTF-8: save it as UTF-8")
    while some := list(islice(records, ROWS_PER_BATCH)):
        yield _part(header, some)


def _part(header: list[str], records: list[tuple[int, list[str] | BadRow]]) -> _Part:
    faults: Faults = {}
    rows: list[list[str]] = []
    for position, (_, record) in enumerate(records):
        rows.append([""] * len(header))  # a bad row keeps its place
        if isinstance(record, BadRow):
            faults[position] = record
        elif len(record) != len(header):
            faults[position] = BadRow("has more or fewer values than the header")
        elif not _is_text(record):
            faults[position] = BadRow("is not UTF-8")
        else:
            rows[-1] = record
    arrays = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
    return _Part(pa.RecordBatch.from_arrays(arrays, names=header), [line for line, _ in records], faults)


def _records(file: SourceFile) -> Iterator[tuple[int, list[str] | BadRow]]:
    """The header and the rows, each with the number of its first line as an editor counts; blank lines are skipped."""
    csv.field_size_limit(FIELD_BYTES)
    with file.buffered() as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, BadRow("is not CSV", f"{error}; a quote within quotes is written twice")
            else:
                if values:
                    yield line, values


def _is_text(values: list[str]) -> bool:
    """Whether all bytes were UTF-8: others have been read as halves of surrogate pairs, which do not encode."""
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_boolean(labels: list[pa.Array]) -> bool:
    """Whether all values that are not empty are true or false, and there are some."""
    known, empty = pa.array([*TRUE, *FALSE, ""]), pa.array([""])
    all_known = all(pc.all(pc.is_in(values, known)).as_py() for values in labels)
    return all_known and not all(pc.all(pc.is_in(values, empty)).as_py() for values in labels)


def _with_boolean(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    values = batch[name]
    boolean = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.bool_()), pc.is_in(values, pa.array(TRUE)))
    return batch.set_column(batch.schema.get_field_index(name), name, boolean)
