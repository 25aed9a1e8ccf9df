"""Settings of the memory allocator on Linux with glibc; results never depend on them."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
KB, MB = 2**10, 2**20


def use_large_pages() -> None:
    """Puts torch's large tensors into large pages, before its first: a copy of 100 MB takes 15 ms and not 53."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def give_back() -> None:
    """Returns large blocks to the system as soon as they are freed."""
    _set({MMAP_THRESHOLD: 256 * KB})


def keep(*, gathered: bool) -> None:
    """Keeps what a training step frees for the next step: the system would clear fresh pages, with a fault for each.

    Large weights that are `gathered` and freed again are returned all the same. Otherwise activations would fill the
    holes that they leave, until the heap is as large as all weights together.
    """
    _set({MMAP_THRESHOLD: (10 if gathered else 32) * MB, TRIM_THRESHOLD: 512 * MB, TOP_PAD: 16 * MB})


def forget_most() -> None:
    """Resets `most_held`."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")


def most_held() -> int:
    """Returns the most bytes that were resident in this process since the reset; elsewhere than on Linux those now."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * KB
    return int(psutil.Process().memory_info().rss)


def _set(settings: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    with suppress(AttributeError):  # of another C library, such as musl
        mallopt, trim = library.mallopt, library.malloc_trim
        for name, value in settings.items():
            mallopt(name, value)
        trim(0)
