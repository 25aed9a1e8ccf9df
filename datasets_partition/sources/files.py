"""The sources that read files: JSON lines, Parquet, CSV, and plain text."""

import csv
import io
import json
import re
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets_partition.core.types import DataError, OnRows, Rows, ignore
from datasets_partition.formats.conversion import ROWS_PER_BATCH, Conversion, Faults
from datasets_partition.formats.forms import OnBadRow
from datasets_partition.formats.rows import BadRow
from datasets_partition.sources.location import PACKED, SourceFile, fingerprint, source_files

ARRAY = re.compile(rb"\s*\[\s*(\{|\]|$)")  # how a JSON array of objects starts
SEPARATORS = ",\t;|"
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
FIRST_LINE = 2**16  # bytes in which the names of columns must end
FIELD_BYTES = 2**31 - 1  # the csv module's default is 128 KiB, less than a long text
TRUE, FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")


@dataclass(frozen=True, kw_only=True)
class Files(ABC):
    """The rows of a file, or of a folder's files; `columns` gives a column's name there: {prompt = "question"}.

    `leave_out` names keys of turns, and columns beside them, that are not read. Of a folder those files are read whose
    names have the first of the `endings` that occurs in it, plain or compressed.
    """

    kind: str
    path: str
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"
    # Without a place in the text that names a store, where only the fingerprint has it: earlier stores are used on.
    leave_out: tuple[str, ...] = field(default=(), repr=False)
    endings: ClassVar[tuple[str, ...]]
    packed: ClassVar[Collection[str]] = PACKED

    def fingerprint(self) -> str:
        """A hash of the files' content, with the keys that are left out."""
        return " without ".join([fingerprint(self._files()), *self.leave_out])

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in the files' order. Raises DataError, with the row's number, for a bad row."""
        conversion = Conversion(self.columns, self.on_bad_row, on_rows, self.leave_out)
        self._add(self._files(), conversion)
        return conversion.rows(self.path)

    def _files(self) -> list[SourceFile]:
        files = source_files(self.path, self.endings, packed=self.packed)
        groups = (tuple(ending + packed for packed in ("", *self.packed)) for ending in self.endings)
        chosen = ([file for file in files if file.path.lower().endswith(group)] for group in groups)
        return next(filter(None, chosen), files)

    @abstractmethod
    def _add(self, files: list[SourceFile], conversion: Conversion) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Jsonl(Files):
    """JSON lines, `.jsonl`: one object a line; or a JSON array of objects, `.json`."""

    kind: Literal["jsonl"] = "jsonl"
    endings = (".jsonl", ".json")

    def _add(self, files: list[SourceFile], conversion: Conversion) -> None:
        conversion.add_objects(row for file in files for row in _json_rows(file))


def _json_rows(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Rows with their names; a bad line comes in its place, so that the first bad row is named, whatever its fault."""
    with file.buffered() as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        for place, (number, line) in enumerate(lines):
            if not place and ARRAY.match(line.removeprefix(BOM_UTF8)):
                yield from _items(file, line + stream.read())
                return
            yield f"{file.name} line {number}", _parsed(line)


def _items(file: SourceFile, content: bytes) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The rows of a JSON array."""
    items = _value(content)
    if isinstance(items, BadRow):
        raise DataError(f"{file.name} is no whole JSON array ({items.detail}): correct it")
    for number, item in enumerate(items, 1):
        yield f"{file.name} item {number}", item if isinstance(item, dict) else BadRow("is not a JSON object")


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    row = _value(line)
    return row if isinstance(row, dict | BadRow) else BadRow("is not a JSON object")


def _value(text: bytes) -> Any:
    """The value of JSON text, or why it has none."""
    try:
        value = json.loads(text.decode("utf-8-sig"))  # files from Windows may start with a byte order mark
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of an escaped surrogate pair is not text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return BadRow("is not UTF-8", f"{error.reason}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        where = f"at character {error.colno}" if error.lineno == 1 else "at its end"
        return BadRow("is not JSON", f"{error.msg} {where}; each line must be one whole row, as jq -c writes it")
    except (ValueError, RecursionError) as error:
        return BadRow("is not JSON", f"{error}; each line must be one whole row")
    return value


@dataclass(frozen=True, kw_only=True)
class ParquetFiles(Files):
    """Parquet files; a subfolder `x=1` is a column x of its rows, as text."""

    kind: Literal["parquet"] = "parquet"
    endings = (".parquet",)
    packed = ()

    def _add(self, files: list[SourceFile], conversion: Conversion) -> None:
        for file in files:
            conversion.add_batches(_parquet_batches(file), file.name)


def _parquet_batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    errors = pa.ArrowException, OSError, UnicodeDecodeError  # the last is raised for a column's name
    with file.opened() as stream, file.whole("Parquet", "fetch or write it", *errors):
        for batch in pq.ParquetFile(stream).iter_batches(ROWS_PER_BATCH):
            # The columns that the names of the file's folders hold, as Hive and Spark write them.
            for folder in PurePosixPath(file.relative).parts[:-1]:
                name, equals, value = folder.partition("=")
                if equals and name not in batch.schema.names:
                    text = None if value == NO_VALUE else unquote(value)
                    batch = batch.append_column(name, pa.repeat(pa.scalar(text, pa.string()), len(batch)))
            yield batch


@dataclass(frozen=True, kw_only=True)
class CsvFiles(Files):
    """CSV files, `.csv` or `.tsv`, whose first line names the columns, between commas, tabs, semicolons or bars.

    All columns are text, so that the keys 007 and 7 stay apart; partitioners read numbers and times from it. Only a
    `label` that is true or false wherever it is not empty is boolean, as an unpaired preference needs it.
    """

    kind: Literal["csv"] = "csv"
    endings = (".csv", ".tsv")

    def _add(self, files: list[SourceFile], conversion: Conversion) -> None:
        label = self.columns.get("label", "" if "label" in self.columns.values() else "label")
        for file in files:
            parts = list(_csv_parts(file))
            labels = [batch[label] for batch, *_ in parts if batch.schema.names.count(label) == 1]
            values = set(pc.unique(pa.chunked_array(labels, pa.string())).to_pylist()) - {""}
            is_boolean = values and values.issubset({*TRUE, *FALSE})
            for batch, lines, faults in parts:
                if is_boolean:
                    text, null = batch[label], pa.scalar(None, pa.bool_())
                    boolean = pc.if_else(pc.equal(text, ""), null, pc.is_in(text, pa.array(TRUE)))
                    batch = batch.set_column(batch.schema.get_field_index(label), label, boolean)
                conversion.add_batch(batch, file.name, lines, "line", faults)


def _csv_parts(file: SourceFile) -> Iterator[tuple[pa.RecordBatch, list[int], Faults]]:
    """Some rows of a CSV file at a time, the number of each row's first line, and the bad rows among them."""
    records = _records(file)
    _, header = next(records, (0, None))
    if header is None:
        raise DataError(f"{file.name} is empty: give it a header and rows")
    if isinstance(header, BadRow):
        raise DataError(f"{file.name} has a header that {header.reason} ({header.detail}): correct it")
    if not _is_text(header):
        raise DataError(f"{file.name} is not UTF-8: save it as UTF-8")
    while some := list(islice(records, ROWS_PER_BATCH)):
        faults: Faults = {}
        rows: list[list[str]] = []
        for position, (_, record) in enumerate(some):
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
        yield pa.RecordBatch.from_arrays(arrays, names=header), [line for line, _ in some], faults


def _records(file: SourceFile) -> Iterator[tuple[int, list[str] | BadRow]]:
    """The header and the rows, each with the number of its first line as an editor counts; blank lines are skipped."""
    csv.field_size_limit(FIELD_BYTES)
    with file.buffered() as stream:
        delimiter = _separator(stream.peek(FIRST_LINE)[:FIRST_LINE])
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        record: list[str] | BadRow | None = []
        while record is not None:
            line = reader.line_num + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                record = BadRow("is not CSV", f"{error}; a quote within quotes is written twice")
            if record:
                yield line, record


def _separator(beginning: bytes) -> str:
    """The first of the separators that stands between names in the first line; a comma if none does."""
    text = beginning.decode("utf-8-sig", "surrogateescape").lstrip("\r\n").splitlines()
    for separator in SEPARATORS:
        with suppress(csv.Error):
            if len(next(csv.reader(text[:1], delimiter=separator, strict=True), [])) > 1:
                return separator
    return ","


def _is_text(values: list[str]) -> bool:
    """Whether all bytes were UTF-8: others have been read as halves of surrogate pairs, which do not encode."""
    text = "".join(values)
    return text.encode(errors="ignore").decode() == text


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Text files below a folder: each a row, or each of its paragraphs; blank ones are skipped.

    A row's client is the first subfolder on the way to its file, or the file's stem; its column `file` is the path.
    """

    kind: Literal["text"] = "text"
    path: str
    suffixes: tuple[str, ...] = (".txt", ".md")
    split: Literal["file", "paragraph"] = "file"
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        if not self.suffixes or not all(self.suffixes):
            raise DataError('data.source.suffixes names no endings of files: give some, such as [".txt"]')

    def fingerprint(self) -> str:
        """A hash of the files' names and content."""
        return fingerprint(source_files(self.path, self.suffixes))

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in the order of the files' paths. Raises DataError for a file that is not text."""
        conversion = Conversion({}, self.on_bad_row, on_rows)
        conversion.add_objects(row for file in source_files(self.path, self.suffixes) for row in self._rows(file))
        return conversion.rows(self.path)

    def _rows(self, file: SourceFile) -> Iterator[tuple[str, dict[str, str] | BadRow]]:
        with file.opened() as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield file.name, BadRow("is not UTF-8", error.reason)
            return
        path = PurePosixPath(file.relative or PurePosixPath(file.path).name)
        client = path.parts[0] if len(path.parts) > 1 else path.stem
        for part in [text] if self.split == "file" else map(str.strip, re.split(r"\n\s*\n", text)):
            if part.strip():
                yield file.name, {"text": part, "client": client, "file": str(path)}
