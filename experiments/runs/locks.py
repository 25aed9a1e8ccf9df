"""Locks of run folders: one command works on a folder at a time, and the lock ends with its process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from engine.messages.errors import RunError


class Lock:
    """Keeps other processes, and cleaners of temporary files that respect locks, from a folder until it is deleted."""

    def __init__(self, descriptor: int, location: str) -> None:
        self.descriptor = descriptor
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another command on this machine is working on {location}: wait for its end, or choose another --out"
            ) from None
        except OSError:
            pass  # some network file systems cannot lock folders

    def __del__(self) -> None:
        os.close(self.descriptor)


# The locks of this process, which may continue a run while the error that ended it still refers to its lock.
_LOCKS: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


def locked(folder: Path, location: str) -> Lock:
    """The lock of a folder, which errors call `location`; RunError while another process has it."""
    lock = _LOCKS.get(folder) or Lock(os.open(folder, os.O_RDONLY), location)
    _LOCKS[folder] = lock
    return lock


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes and locks a run folder, and removes it if it is still empty at the end; RunError as `locked`."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder.resolve(), str(folder))
    except OSError as error:
        raise RunError(f"{folder} cannot be a run folder ({error}): choose another --out") from error
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()
        del lock  # now, though an error may refer to this frame
