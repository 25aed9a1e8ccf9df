import mmap
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.system.page_protection import IN_STORE, drop_pages, protect, release

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import mmap, sys
import numpy as np
from engine.system.page_protection import protect

# Four whole pages, and a beginning and an end of pages that hold others' bytes too.
page = mmap.PAGESIZE
room = np.zeros(6 * page, np.uint8)
start = -room.ctypes.data % page + page // 2
buffer = room[start : start + 5 * page - page // 2 - 1]
buffer[:] = 7
protect(buffer)
assert buffer.sum() == 7 * len(buffer)
print("read", flush=True)
room[start - 1] = room[start + len(buffer)] = 1
print("neighbors written", flush=True)
buffer[int(sys.argv[1])] = 1
print("written", flush=True)
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect is used on Linux alone")


@linux
@pytest.mark.parametrize("at", [mmap.PAGESIZE // 2, 3 * mmap.PAGESIZE])
def test_a_write_ends_the_process_and_reading_goes_on(at: int) -> None:
    completed = subprocess.run([sys.executable, "-c", SCRIPT, str(at)], cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == -signal.SIGSEGV, completed.stderr
    assert completed.stdout.split("\n") == ["read", "neighbors written", ""]


@linux
def test_a_released_buffer_may_be_written_again() -> None:
    room = np.zeros(6 * mmap.PAGESIZE, np.uint8)
    protect(room)
    release(room)
    room[:] = 1
    assert room.sum() == len(room)


@linux
def test_what_is_looked_away_from_is_still_there_and_not_in_memory(tmp_path: Path) -> None:
    path, length = tmp_path / "shared", 2 * IN_STORE
    path.write_bytes(bytes([7]) * length)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), length) as pages:
        buffer = np.frombuffer(pages, np.uint8)
        assert buffer.sum() == 7 * length and resident(path) >= length
        drop_pages(buffer)
        assert resident(path) == 0
        assert buffer.sum() == 7 * length
        del buffer


@linux
def test_small_buffers_which_are_in_no_store_keep_their_bytes() -> None:
    buffer = np.full(25 * mmap.PAGESIZE, 7, np.uint8)  # as large as Ray's messages may be
    drop_pages(buffer)
    assert buffer.sum() == 7 * len(buffer)


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return 1024 * int(next(rss for rss in lines if rss.startswith("Rss:")).split()[1])
    raise AssertionError(path)


@linux
def test_a_buffer_without_a_whole_page_is_left_alone() -> None:
    room = np.zeros(3 * mmap.PAGESIZE, np.uint8)
    first = -room.ctypes.data % mmap.PAGESIZE
    for size in (0, 1, mmap.PAGESIZE - 1):
        buffer = room[first : first + size]
        protect(buffer)
        buffer[:] = 1
    assert room.sum() == mmap.PAGESIZE - 1
