"""Where data lies: a local path, or any location that pyarrow.fs knows by its URI (s3://, gs://, ...); files there."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from datasets_partition.core.types import DataError

# What compressed files begin with, and their endings.
MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00", "zstd": b"\x28\xb5\x2f\xfd"}
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
BROKEN = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)  # raised for damaged ones


def located(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of `location` and the path within it; DataError for a URI that no file system accepts."""
    if is_local(location):
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    refuse_password(location)
    try:
        return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{location} is not a location that can be read: {str(error).splitlines()[0]}") from None


def refuse_password(location: str) -> None:
    """Raises DataError if `location` is a URI with a password or key in it."""
    scheme, _, rest = location.partition("://")
    options = rest.partition("?")[2].lower()
    if ":" in rest.partition("/")[0].rpartition("@")[0] or re.search(r"(^|&)(sig|client_secret)=", options):
        raise DataError(
            f"a location {scheme}://... holds a password, which manifests and messages would repeat: take it out, and "
            f"put it where that service's tools look for it, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in "
            f"the environment"
        )


def within(location: str, name: str) -> str:
    """The location of `name` below the folder `location`; a URI's options (`?...`) stay at its end."""
    path, question, options = location.partition("?") if not is_local(location) else (location, "", "")
    return f"{path.rstrip('/')}/{name}{question}{options}"


def is_local(location: str) -> bool:
    """Whether `location` is a path on this machine."""
    return "://" not in location


def node_cache() -> Path:
    """The owner's folder for copies of remote files here; it may be deleted. DataError if another user made it."""
    folder = Path(tempfile.gettempdir()) / f"fedpost-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} belongs to another user: let TMPDIR name another folder for temporary files")
    return folder


@dataclass(frozen=True)
class SourceFile:
    """A file by its path in its file system; `name` is what errors call it, `relative` its path in the folder."""

    system: fs.FileSystem
    path: str
    name: str
    relative: str

    @contextmanager
    def opened(self) -> Iterator[pa.NativeFile]:
        """The file's bytes. Raises DataError if they cannot be read, here or in the block."""
        try:
            with self.system.open_input_file(self.path) as stream:
                yield stream
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {first_line(error)}") from None

    @contextmanager
    def whole(self, kind: str, remedy: str, *errors: type[Exception]) -> Iterator[None]:
        """Raises DataError where one of these errors in the block shows that the file is damaged."""
        try:
            yield
        except errors as error:
            raise DataError(f"{self.name} is not a whole {kind} file ({first_line(error)}): {remedy} again") from None

    @contextmanager
    def buffered(self) -> Iterator[io.BufferedReader]:
        """Like `opened`, for lines of text; decompressed by what it begins with. Raises DataError for Parquet."""
        with self.opened() as stream:
            head = stream.read(6)
            stream.seek(0)
            kind = next((kind for kind, magic in MAGIC.items() if head.startswith(magic)), None)
            if kind is None and (ending := Path(self.path.lower()).suffix) in PACKED:
                kind = PACKED[ending]
            # Decoders of these raise what a disk raises, too.
            errors = (*BROKEN, OSError) if kind in ("bzip2", "zstd") else BROKEN
            with self.whole(kind or "text", "fetch or compress it", *errors):
                lines = io.BufferedReader(_unpacked(stream, kind), 2**20)
                if lines.peek(4).startswith(b"PAR1"):
                    raise DataError(f'{self.name} is a Parquet file: read it with data.source.kind = "parquet"')
                yield lines


def _unpacked(stream: pa.NativeFile, kind: str | None) -> Any:
    match kind:
        case "gzip":
            return gzip.GzipFile(fileobj=stream)
        case "bzip2":
            return bz2.BZ2File(stream)
        case "xz":
            return lzma.LZMAFile(stream)
        case "zstd":
            return pa.CompressedInputStream(stream, "zstd")
    return stream


def source_files(
    location: str, suffixes: tuple[str, ...], key: str = "data.source.path", packed: Collection[str] = ()
) -> list[SourceFile]:
    """The file at `location`, or those below that folder with one of the `suffixes`, in the order of their paths.

    One of the endings `packed` may follow. Capitals in an ending do not matter; hidden files are left out. Raises
    DataError, which names `key`, for none.
    """
    endings = tuple(suffix.lower() + end for suffix in suffixes for end in ("", *packed))
    system, path = located(location)
    try:
        info = system.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{key} is {location!r}, {_no_file(location)}: correct the path")
        if info.type == fs.FileType.File:
            return [SourceFile(system, path, location, "")]
        below = system.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise DataError(f"{key} is {location!r}, which cannot be read: {first_line(error)}") from None
    base = path.rstrip("/") + "/"
    names = sorted(file.path.removeprefix(base) for file in below if file.type == fs.FileType.File)
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    wanted = [name for name in shown if name.lower().endswith(endings)]
    if not wanted:
        raise DataError(
            f"{key} is {location!r}, a folder without a file that ends in {' or '.join(suffixes)}: correct the path"
        )
    return [SourceFile(system, base + name, within(location, name), name) for name in wanted]


def _no_file(location: str) -> str:
    if not is_local(location) or Path(location).expanduser().is_absolute():
        return "where there is no file or folder"
    path = Path(location).absolute()
    return f"and there is no file or folder {path} (relative paths start at the folder that the command runs in)"


def fingerprint(files: list[SourceFile]) -> str:
    """A hash over the files' bytes and relative names; for remote files, over sizes and times instead of bytes."""
    return sha256(json.dumps([[file.relative, _state(file)] for file in files]).encode()).hexdigest()


def _state(file: SourceFile) -> str:
    if isinstance(file.system, fs.LocalFileSystem):
        with file.opened() as stream:
            return file_digest(stream, "sha256").hexdigest()
    info = file.system.get_file_info(file.path)
    return f"{info.size} {info.mtime_ns}"


def first_line(error: BaseException) -> str:
    """The first line of a library's message."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
