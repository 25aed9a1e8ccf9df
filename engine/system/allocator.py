"""How memory is had and given back: in large pages; at once while models are loaded, and kept while they train.

Only Linux and glibc are told; elsewhere nothing happens, and results never depend on it.
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
KB, MB = 2**10, 2**20


def use_large_pages() -> None:
    """Lets torch's large tensors lie in large pages, if it has made none yet.

    To clear small ones, one by one, costs more than to fill them: a copy of 100 MB took 53 ms, and takes 15.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def give_back() -> None:
    """Large blocks are the system's again when they are freed: a process is not larger than what it holds."""
    _tell({MMAP_THRESHOLD: 256 * KB})


def keep(*, gathered: bool) -> None:
    """What a step frees the next one finds: fresh pages would be cleared by the system, one fault each.

    Large weights that are `gathered` and let go do go back: else activations would be put into the holes that they
    leave, until the heap is as large as all weights together.
    """
    _tell({MMAP_THRESHOLD: (10 if gathered else 32) * MB, TRIM_THRESHOLD: 512 * MB, TOP_PAD: 16 * MB})


def forget_most() -> None:
    """Lets `most_held` begin anew."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")


def most_held() -> int:
    """The most bytes that were resident in this process since; where nobody tells, those that are."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * KB
    return int(psutil.Process().memory_info().rss)


def _tell(settings: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    try:
        mallopt, trim = library.mallopt, library.malloc_trim
    except AttributeError:  # another C library, such as musl
        return
    for name, value in settings.items():
        mallopt(name, value)
    trim(0)
