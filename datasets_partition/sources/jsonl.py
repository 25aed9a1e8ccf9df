"""The source for people's own rows: JSON lines, plain or gzipped."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from datasets_partition.core.types import OnRows, Rows, ignore
from datasets_partition.formats.bad_rows import BadRow, BadRows, OnBadRow
from datasets_partition.formats.conversion import ROWS_PER_BATCH, Conversion
from datasets_partition.sources.source_files import SourceFile, fingerprint, source_files

SUFFIXES = (".jsonl", ".jsonl.gz")
ARRAY = re.compile(rb"\s*\[\s*(\{|$)")  # how a JSON array of objects starts


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """The rows of one file, `.jsonl` or `.jsonl.gz`, or of a folder of them: one JSON object a line.

    `columns` says what the file calls a column: {prompt = "question"}.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"

    def fingerprint(self) -> str:
        """What the rows depend on beside this section: the files' content."""
        return fingerprint(source_files(self.path, SUFFIXES))

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in the files' order. Raises ValueError, with the line's number, for what is no row."""
        conversion = Conversion(self.columns, BadRows(self.on_bad_row), on_rows)
        rows = (row for file in source_files(self.path, SUFFIXES) for row in _rows(file))
        while some := list(islice(rows, ROWS_PER_BATCH)):
            conversion.add_objects(some)
        return conversion.rows(self.path)


def _rows(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Rows, and what is none in its place, so that the first of them is named whatever is wrong with it."""
    seen = False
    for number, line in _lines(file):
        if not seen and ARRAY.match(line.removeprefix(BOM_UTF8)):
            raise ValueError(
                f"{file.name} is a JSON array, which no data.source.kind reads: write one JSON object a line for "
                f"kind = \"jsonl\", as jq -c '.[]' does"
            )
        seen = True
        where = f"{file.name} line {number}"
        try:
            yield where, _parsed(line)
        except BadRow as fault:
            yield where, fault


def _lines(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    with file.buffered() as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # files from Windows may start with a byte order mark
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRow("is not UTF-8", f"{error.reason}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"at character {error.colno}" if error.lineno == 1 else "at its end"
        detail = f"{error.msg} {where}; each line must be one whole row, as jq -c writes it"
        raise BadRow("is not JSON", detail) from None
    except (ValueError, RecursionError) as error:
        raise BadRow("is not JSON", f"{error}; each line must be one whole row") from None
    if not isinstance(row, dict):
        raise BadRow("is not a JSON object")
    return row
