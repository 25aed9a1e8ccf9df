"""What a process is told of its own memory."""

import sys

import pytest
import torch

from engine.system import allocator as heap

MB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the most that there was")
def test_the_most_that_was_held_is_seen_after_it_was_given_back() -> None:
    heap.give_back()
    heap.forget_most()
    before = heap.most_held()
    torch.ones(64 * MB, dtype=torch.uint8)
    assert heap.most_held() - before > 60 * MB
    heap.forget_most()
    assert heap.most_held() - before < 30 * MB
