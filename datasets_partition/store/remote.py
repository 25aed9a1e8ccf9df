"""Stores in remote locations: copied to this machine whole, and copied there whole."""

import os
from pathlib import Path

from pyarrow import fs

from datasets_partition.core.errors import DataError
from datasets_partition.sources.location import first_line, is_local, located
from datasets_partition.store.sealed import MANIFEST, key_of
from datasets_partition.store.store import written_whole


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
