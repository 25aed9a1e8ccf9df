"""Folders of the cache with a manifest, written last: what they were made from, and the sizes of their files.

It holds a digest of itself, the index and the other files' footers, which locate all else; Parquet has checksums.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from io import SEEK_END
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from datasets_partition.core.types import DataError
from datasets_partition.sources.location import first_line, is_local, located, node_cache

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
                magic = MAGIC[Path(name).suffix]  # after the footer and its length
                file.seek(-4 - magic, SEEK_END)
                length = int.from_bytes(file.read(4), "little")
                file.seek(-4 - magic - length, SEEK_END)
            digest.update(file_digest(file, sha256).digest())
    return digest.hexdigest()


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


def ready(folder: Path, key: str, remote: str | None) -> bool:
    """Whether `folder` was sealed under `key`, here or at `remote`; DataError if it is damaged or holds another."""
    for scratch in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - scratch.stat().st_mtime > 86_400:  # a day: its writer was killed
            shutil.rmtree(scratch, ignore_errors=True)
    if not folder.exists() and not (remote and fetch(remote, folder)):
        return False
    refuse_another(folder, key)
    return True


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields a scratch folder that becomes `folder` if the block succeeds; of two writers the second's is dropped."""
    scratch = folder.with_name(f".{folder.name}-{uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(location: str, folder: Path) -> bool:
    """Copies the folder at `location` to `folder`; False if no whole one is there, DataError if it is damaged."""
    system, path = located(location)
    try:
        if system.get_file_info(f"{path}/{MANIFEST}").type != fs.FileType.File:
            return False
        with written_whole(folder) as scratch:
            for file in system.get_file_info(fs.FileSelector(path)):
                if file.type == fs.FileType.File:
                    fs.copy_files(file.path, str(scratch / file.base_name), system, fs.LocalFileSystem())
            if key_of(scratch) is None:
                raise DataError(f"{location} is damaged: delete it there, and it is made again")
    except OSError as error:
        raise DataError(f"data.cache cannot be read at {location}: {first_line(error)}") from error
    return True


def refuse_unwritable(cache: str) -> None:
    """Raises DataError, before anything is read, if `cache` cannot be a folder of stores."""
    if not is_local(cache):
        located(cache)
        return
    folder = Path(cache).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "is a file" if existing.is_file() else "may not be written to"
        raise DataError(f"data.cache is {cache}, but {existing} {what}: name another folder")


def publish(folder: Path, location: str) -> None:
    """Copies `folder` to `location` unless it is there; the manifest comes last and makes it valid."""
    files = sorted((file for file in folder.iterdir() if file.is_file()), key=lambda file: file.name == MANIFEST)
    put(files, location, unless=MANIFEST)


def put(files: list[Path], location: str, unless: str) -> None:
    """Copies files into `location` unless it holds the file `unless`. Raises DataError where it takes none."""
    system, path = located(location)
    try:
        if system.get_file_info(f"{path}/{unless}").type == fs.FileType.File:
            return
        system.create_dir(path, recursive=True)
        for file in files:
            fs.copy_files(str(file), f"{path}/{file.name}", fs.LocalFileSystem(), system)
    except OSError as error:
        raise DataError(f"data.cache cannot be written at {location}: {first_line(error)}") from error
