"""Folders of the cache with a manifest, written last: what they were made from, and the sizes of their files.

It holds a digest of itself, the index, and the footers of the other files, which locate all other bytes; pages of
Parquet have their own checksums. Errors name a damaged folder and say that it may be removed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from io import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from datasets_partition.core.errors import DataError
from datasets_partition.sources.location import first_line, node_cache

MANIFEST, INDEX = "manifest.json", "index.arrow"
MAGIC = {".parquet": 4, ".arrow": 6}  # length of the bytes that end a file


def seal(folder: Path, key: str, known: dict[str, Any]) -> None:
    """Writes the manifest of a folder whose other files are all written; the folder's name comes from `key`."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    manifest = {"key": key, **known, "bytes": sizes}
    text = json.dumps(manifest | {"digest": _digest(folder, manifest)}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def key_of(folder: Path) -> str | None:
    """The key under which a folder was sealed; None if it was not sealed, or has changed since."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        inside = all(Path(name).name == name != ".." for name in manifest["bytes"])  # no path out of the folder
        whole = inside and all((folder / name).stat().st_size == size for name, size in manifest["bytes"].items())
        if not whole or manifest["digest"] != _digest(folder, manifest):
            return None
        with pa.memory_map(str(folder / INDEX)) as file:
            pa.ipc.open_file(file).read_all().validate(full=True)  # it may come from elsewhere
        return str(manifest["key"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException):
        return None


def _digest(folder: Path, manifest: dict[str, Any]) -> str:
    """A digest of the manifest without its digest, the index, and the other files' footers."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    digest = sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(manifest["bytes"]):
        with (folder / name).open("rb") as file:
            if name != INDEX:
                _to_footer(file, MAGIC[Path(name).suffix])
            digest.update(file_digest(file, sha256).digest())
    return digest.hexdigest()


def _to_footer(file: BinaryIO, magic: int) -> None:
    """Seeks the footer of a file that ends with a footer, the footer's length, and `magic` bytes."""
    file.seek(-4 - magic, SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-4 - magic - length, SEEK_END)


def refuse_another(folder: Path, key: str) -> None:
    """Raises DataError unless `folder` was sealed under `key` and is whole."""
    if key_of(folder) != key:
        raise DataError(f"{folder} is not what belongs there, or is damaged: move or delete it, and it is made again")


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raises DataError, with the way out, if a file of `folder` cannot be read in the block."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        copied = ""
        if folder.is_relative_to(node_cache()):
            copied = f", and {folder.relative_to(node_cache())} in data.cache, from which it may be copied"
        raise DataError(
            f"{folder} is damaged ({first_line(error)}): move or delete it{copied}; then it is made again"
        ) from error
