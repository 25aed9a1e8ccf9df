"""What is tried where clients raise or run out of memory: each once more, and only what must be apart is."""

import subprocess
import sys

import torch

from engine.workers.client_runner import Attempted, attempted


def test_what_works_is_done_once():
    asked = []
    attempts = attempted((3, 1, 2), lambda lanes: asked.append(lanes) or [10 * client for client in lanes], 2)
    assert attempts == [Attempted(3, 30), Attempted(1, 10), Attempted(2, 20)]
    assert asked == [(3, 1, 2)]


def test_a_pack_that_is_too_large_is_halved_until_it_fits():
    trained = []

    def train(lanes):
        if len(lanes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        trained.append(lanes)
        return list(lanes)

    attempts = attempted((0, 1, 2, 3, 4), train, 0)
    assert trained == [(0, 1), (2,), (3, 4)] and [attempt.result for attempt in attempts] == [0, 1, 2, 3, 4]
    first, *_, last = attempts
    assert [why.partition(": OutOfMemoryError: ")[0] for why in first.why] == ["in lanes with clients 0, 1, 2, 3, 4"]
    assert len(last.why) == 2 and last.why[1].startswith("in lanes with clients 2, 3, 4: ")


def test_the_cpus_allocator_is_understood():
    sizes = []

    def train(lanes):
        sizes.append(len(lanes))
        if len(lanes) == 4:
            torch.empty(2**62, dtype=torch.uint8)
        return list(lanes)

    attempted((0, 1, 2, 3), train, 0)
    assert sizes == [4, 2, 2]


def test_a_client_that_raises_is_left_alone_and_named():
    asked = []

    def train(lanes):
        asked.append(lanes)
        if 1 in lanes:
            raise KeyError("no such column")
        return list(lanes)

    attempts = attempted((0, 1, 2), train, 2)
    assert asked == [(0, 1, 2)] * 3 + [(0,), (1,), (2,)]  # a lanes apart gives other bits: only where it must be
    assert [attempt.result for attempt in attempts] == [0, None, 2]
    assert attempts[1].why[3:] == ("KeyError: 'no such column'",) and len(attempts[0].why) == 3
    asked.clear()
    assert attempted((1,), train, 2)[0].why == ("KeyError: 'no such column'",) * 3 and len(asked) == 3


def test_a_client_that_raises_once_is_as_good_as_the_others():
    raised = []

    def train(lanes):
        if not raised:
            raised.append(lanes)
            raise OSError("the disk was gone for a moment")
        return list(lanes)

    (attempt,) = attempted((7,), train, 1)
    assert attempt.result == 7 and attempt.why == ("OSError: the disk was gone for a moment",)


def test_a_process_that_has_lost_its_gpu_ends():
    """Whatever it would be asked next would fail, and the clients for it."""
    program = """
import torch
from engine.workers.client_runner import Attempted, attempted

def train(lanes):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

attempted((0, 1), train, 5)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("AcceleratorError: CUDA error: an illegal memory access")
    assert ended.stderr.count("CUDA error") == 1
