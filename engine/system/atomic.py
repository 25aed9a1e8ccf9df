"""Files that are there whole or not at all, whatever happens while they are written."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes a file beside its place, flushes it to disk, and moves it there; an OSError leaves what was before."""
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
    """Makes a folder, if there is none, whose name is on disk when this returns."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to disk: until then a crash of the machine may take a move back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes a folder of files as `write_file` does one, asking for one at a time; OSError leaves what was before."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        for name, content in files:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(scratch / name, content)
        aside = path.with_name(f".{path.name}.old")
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)  # what a kill has left; where it took `path`, all that there is
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
