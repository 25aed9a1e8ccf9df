"""Stores in a location that is no local folder: brought to this machine whole, and left there whole."""

import os
import tempfile
from pathlib import Path

from pyarrow import fs

from datasets_partition.location import is_local, located
from datasets_partition.source_files import first_line
from datasets_partition.store import written_whole

# A folder elsewhere counts once it holds this file, which is copied last.
MANIFEST = "manifest.json"


def node_cache() -> Path:
    """The folder of this machine that holds copies of what lies elsewhere; it may be deleted at any time."""
    return Path(tempfile.gettempdir()) / f"fedpost-{os.getuid()}"


def fetch(location: str, folder: Path, last: str = MANIFEST) -> bool:
    """Copies the files of the folder at `location` to `folder`; False if there is none, or none that is whole.

    Raises ValueError where the location cannot be read.
    """
    system, path = located(location)
    try:
        if system.get_file_info(f"{path}/{last}").type != fs.FileType.File:
            return False
        with written_whole(folder) as scratch:
            for file in system.get_file_info(fs.FileSelector(path)):
                if file.type == fs.FileType.File:
                    fs.copy_files(file.path, str(scratch / file.base_name), system, fs.LocalFileSystem())
    except OSError as error:
        raise ValueError(f"data.cache cannot be read at {location}: {first_line(error)}") from error
    return True


def refuse_unwritable(cache: str) -> None:
    """Raises ValueError, before anything is read, if `cache` can be no folder of stores."""
    if not is_local(cache):
        located(cache)
        return
    folder = Path(cache).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "is a file" if there.is_file() else "may not be written to"
        raise ValueError(f"data.cache is {cache}, but {there} {what}: name another folder")


def publish(folder: Path, location: str, last: str = MANIFEST) -> None:
    """Copies the files of `folder` to `location` unless they are there; without the file `last` they do not count.

    Raises ValueError where the location takes no files.
    """
    system, path = located(location)
    try:
        if system.get_file_info(f"{path}/{last}").type == fs.FileType.File:
            return
        system.create_dir(path, recursive=True)
        for file in sorted((file for file in folder.iterdir() if file.is_file()), key=lambda file: file.name == last):
            fs.copy_files(str(file), f"{path}/{file.name}", fs.LocalFileSystem(), system)
    except OSError as error:
        raise ValueError(f"data.cache cannot be written at {location}: {first_line(error)}") from error
