"""Protects the shared base: one stray in-place operation would change it for every slot of the node."""

import ctypes
import mmap
import sys

import numpy as np

PROT_READ, PROT_WRITE = 1, 2
UNPROTECTED = "the shared base cannot be protected against writes"
# Bytes of a buffer that surely lies in the object store. Ray sends small ones within its messages, into memory of this
# process alone, whose pages would come back as zeros.
IN_STORE = 2**20


def protect(buffer: np.ndarray) -> None:
    """Makes the whole pages inside a read-only NumPy buffer unwritable for this process; a later write ends it.

    NumPy's read-only flag does not bind torch. Release the buffer before the last reference to it goes: the object
    store uses its pages again, and this process could not write there. Raises OSError where the system refuses.
    """
    _call("mprotect", buffer, PROT_READ, UNPROTECTED)


def release(buffer: np.ndarray) -> None:
    """Removes the protection, so that the store may use the pages again. Raises OSError as `protect`."""
    _call("mprotect", buffer, PROT_READ | PROT_WRITE, UNPROTECTED)


def drop_pages(buffer: np.ndarray) -> None:
    """Drops the buffer's pages from this process until it reads them again; in the store they stay."""
    if buffer.nbytes >= IN_STORE:
        _call("madvise", buffer, mmap.MADV_DONTNEED, "the pages of the shared base cannot be dropped")


def _call(name: str, buffer: np.ndarray, argument: int, failed: str) -> None:
    page = mmap.PAGESIZE
    start = -(-buffer.ctypes.data // page) * page
    length = (buffer.ctypes.data + buffer.nbytes) // page * page - start
    if length > 0 and sys.platform.startswith("linux"):
        if ctypes.CDLL(None, use_errno=True)[name](ctypes.c_void_p(start), ctypes.c_size_t(length), argument) != 0:
            raise OSError(ctypes.get_errno(), failed)
