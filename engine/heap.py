"""How the C library's heap treats what is freed: given back at once while models are loaded, kept while they train.

Only glibc is told; elsewhere nothing happens, and results never depend on it.
"""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
KB, MB = 2**10, 2**20


def give_back() -> None:
    """Large blocks are the system's again when they are freed: a process is not larger than what it holds."""
    _tell({MMAP_THRESHOLD: 256 * KB})


def keep(*, gathered: bool) -> None:
    """What a step frees the next one finds: fresh pages would be cleared by the system, one fault each.

    Large weights that are `gathered` and let go do go back: else activations would be put into the holes that they
    leave, until the heap is as large as all weights together.
    """
    _tell({MMAP_THRESHOLD: (10 if gathered else 32) * MB, TRIM_THRESHOLD: 512 * MB, TOP_PAD: 16 * MB})


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
