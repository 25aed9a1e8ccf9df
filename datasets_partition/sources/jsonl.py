"""The source for JSON lines, plain or gzipped."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets_partition.core.errors import DataError
from datasets_partition.core.types import OnRows, Rows, ignore
from datasets_partition.formats.bad_rows import BadRow, OnBadRow
from datasets_partition.formats.conversion import Conversion
from datasets_partition.sources.source_files import SourceFile, fingerprint, source_files

SUFFIXES = (".jsonl", ".jsonl.gz")
ARRAY = re.compile(rb"\s*\[\s*(\{|$)")  # how a JSON array of objects starts


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """The rows of one file, `.jsonl` or `.jsonl.gz`, or of a folder of them: one JSON object a line.

    `columns` gives a column's name in the file: {prompt = "question"}.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"

    def fingerprint(self) -> str:
        """A hash of the files' content."""
        return fingerprint(source_files(self.path, SUFFIXES))

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in the files' order. Raises DataError, with the line's number, for a bad row."""
        conversion = Conversion(self.columns, self.on_bad_row, on_rows)
        conversion.add_objects(row for file in source_files(self.path, SUFFIXES) for row in _rows(file))
        return conversion.rows(self.path)


def _rows(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Rows with their names; a bad line comes in its place, so that the first bad row is named, whatever its fault."""
    is_first = True
    with file.buffered() as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if is_first and ARRAY.match(line.removeprefix(BOM_UTF8)):
                raise DataError(
                    f"{file.name} is a JSON array, which no data.source.kind reads: write one JSON object a line for "
                    f"kind = \"jsonl\", as jq -c '.[]' does"
                )
            is_first = False
            where = f"{file.name} line {number}"
            try:
                yield where, _parsed(line)
            except BadRow as bad:
                yield where, bad


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # files from Windows may start with a byte order mark
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half of an escaped surrogate pair is not text
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
