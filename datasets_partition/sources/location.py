"""Where data lies: a local path, or any location that pyarrow.fs knows by its URI (s3://, gs://, ...)."""

import os
import re
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from datasets_partition.core.errors import DataError


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
