"""Folders of the cache that end with a manifest: what they were made from, and how large their files are.

It holds a digest of itself, the index, and the footers of the other files, by which all else is found; pages of Parquet
have checksums of their own. A reader that finds a folder damaged says which it is, and that it may be removed, whatever
Arrow says of it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from io import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from datasets_partition.sources.location import node_cache
from datasets_partition.sources.source_files import first_line

MANIFEST, INDEX = "manifest.json", "index.arrow"
MAGIC = {".parquet": 4, ".arrow": 6}  # bytes at a file's end


def seal(folder: Path, key: str, known: dict[str, Any]) -> None:
    """Writes the manifest of a folder whose other files are all written; `key` is what its name is made from."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    manifest = {"key": key, **known, "bytes": sizes}
    text = json.dumps(manifest | {"digest": _digest(folder, manifest)}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def key_of(folder: Path) -> str | None:
    """The key under which a folder was sealed; None if it was not, or is not what it was."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own = all(Path(name).name == name != ".." for name in manifest["bytes"])  # no path that leads elsewhere
        whole = own and all((folder / name).stat().st_size == size for name, size in manifest["bytes"].items())
        if not whole or manifest["digest"] != _digest(folder, manifest):
            return None
        with pa.memory_map(str(folder / INDEX)) as file:
            pa.ipc.open_file(file).read_all().validate(full=True)  # it may come from elsewhere
        return str(manifest["key"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException):
        return None


def _digest(folder: Path, manifest: dict[str, Any]) -> str:
    """Of the manifest but for this, the index, and the other files' footers."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    found = sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(manifest["bytes"]):
        with (folder / name).open("rb") as file:
            if name != INDEX:
                _to_footer(file, MAGIC[Path(name).suffix])
            found.update(file_digest(file, sha256).digest())
    return found.hexdigest()


def _to_footer(file: BinaryIO, magic: int) -> None:
    """Goes to the footer of a file that ends with one, the footer's length, and `magic` bytes."""
    file.seek(-4 - magic, SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-4 - magic - length, SEEK_END)


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
