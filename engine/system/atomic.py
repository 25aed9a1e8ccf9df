"""Files that exist whole or not at all, whatever happens while they are written."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes a file under another name, flushes it to disk, and renames it; an OSError leaves the old file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Makes a folder, if there is none; its name is on disk when this returns."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to disk: until then a crash of the machine may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes a folder as `write_file` writes a file, one of its files at a time; an OSError leaves the old folder.

    One process at a time may write it: what killed ones have left of it is removed.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    for left in path.parent.glob(f".{path.name}.*"):
        if left.suffix[1:].isdigit():
            shutil.rmtree(left, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        for name, content in files:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(scratch / name, content)
        aside = path.with_name(f".{path.name}.old")
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)  # left by a kill; without `path` it would be the only copy
            os.replace(path, aside)
        try:
            os.replace(scratch, path)
        except BaseException:
            if aside.exists():
                aside.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
