"""Folders of the cache that end with a manifest: what they were made from, and how large their files are.

A reader that finds one damaged says which folder it is, and that it may be removed, whatever Arrow says of it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from datasets_partition.location import node_cache
from datasets_partition.source_files import first_line

MANIFEST = "manifest.json"


def seal(folder: Path, key: str, known: dict[str, Any]) -> None:
    """Writes the manifest of a folder whose other files are all written; `key` is what its name is made from."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    text = json.dumps({"key": key, **known, "bytes": sizes}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def key_of(folder: Path) -> str | None:
    """The key under which a folder was sealed; None if it was not, or a file has lost its size since."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["bytes"].items())
        return str(manifest["key"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def refuse_another(folder: Path, key: str) -> None:
    """Raises ValueError unless `folder` was sealed under `key` and is whole."""
    if key_of(folder) != key:
        raise ValueError(f"{folder} is not what belongs there, or is damaged: move or delete it, and it is made again")


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raises ValueError, with the way out, if a file of `folder` cannot be read in the block."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        copied = ""
        if folder.is_relative_to(node_cache()):
            copied = f", and {folder.relative_to(node_cache())} in data.cache, from which it may be copied"
        raise ValueError(
            f"{folder} is damaged ({first_line(error)}): move or delete it{copied}; then it is made again"
        ) from error
