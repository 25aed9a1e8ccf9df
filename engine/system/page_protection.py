"""Keeps the shared base from being written: one stray in-place operation would change it for every slot of the node."""

import ctypes
import mmap
import sys

import numpy as np

PROT_READ, PROT_WRITE = 1, 2
# Bytes from which on a buffer surely lies in the store: small ones Ray sends within its messages, to memory of this
# process alone, whose pages would come back as zeros.
IN_STORE = 2**20


def protect(buffer: np.ndarray) -> None:
    """Makes the whole pages inside a read-only NumPy buffer unwritable for this process; a later write ends it.

    NumPy's read-only flag does not bind torch. Before the buffer is let go it must be released: the object store would
    use its pages again, and this process could not write there. Raises OSError where the system refuses.
    """
    _set(buffer, PROT_READ)


def release(buffer: np.ndarray) -> None:
    """Takes the protection back, so that the store may use the pages again. Raises OSError as `protect`."""
    _set(buffer, PROT_READ | PROT_WRITE)


def look_away(buffer: np.ndarray) -> None:
    """Takes the buffer's pages out of this process until it looks at them again; in the store they stay."""
    if buffer.nbytes >= IN_STORE:
        _tell("madvise", buffer, mmap.MADV_DONTNEED, "the shared base cannot be looked away from")


def _set(buffer: np.ndarray, access: int) -> None:
    _tell("mprotect", buffer, access, "the shared base cannot be protected against writes")


def _tell(call: str, buffer: np.ndarray, what: int, failed: str) -> None:
    """Asks the system for something that concerns the whole pages inside a buffer."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    start = -(-buffer.ctypes.data // page) * page
    length = (buffer.ctypes.data + buffer.nbytes) // page * page - start
    if length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc[call](ctypes.c_void_p(start), ctypes.c_size_t(length), what) != 0:
            raise OSError(ctypes.get_errno(), failed)
