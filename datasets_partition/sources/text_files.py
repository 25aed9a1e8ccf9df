"""The source for plain text: a folder of files, whose subfolders are the clients."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from datasets_partition.core.errors import DataError
from datasets_partition.core.types import OnRows, Rows, ignore
from datasets_partition.formats.bad_rows import BadRow, OnBadRow
from datasets_partition.formats.conversion import Conversion
from datasets_partition.sources.source_files import SourceFile, fingerprint, source_files


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Text files below a folder: each a row, or each of its paragraphs; blank ones are skipped.

    A row's client is the first subfolder on the way to its file, or the file's stem if there is none; its column
    `file` is the file's path in the folder.
    """

    kind: Literal["text"] = "text"
    path: str
    suffixes: tuple[str, ...] = (".txt", ".md")
    split: Literal["file", "paragraph"] = "file"
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        """Raises DataError if no file could match."""
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
