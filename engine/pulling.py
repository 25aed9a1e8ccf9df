"""Slots pull chunks of clients: whoever is idle takes some, and what a dead slot had done is handed out again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from engine.lost import LOST

if TYPE_CHECKING:
    from engine.slots import Slots

CHUNKS_PER_SLOT = 3


def pull(
    pool: Slots, clients: np.ndarray, costs: np.ndarray, call: Callable[[Any, list[int]], Any]
) -> dict[int, list[Any]]:
    """What each slot that is still alive has done of `clients` (N,), the longest work (`costs`) first."""
    longest_first = clients[np.argsort(-costs, kind="stable")]
    kinds = pool.kinds(longest_first)
    queues = {kind: deque(longest_first[kinds == kind].tolist()) for kind in set(kinds.tolist())}
    slots = Counter(pool.kind_of(slot) for slot in range(pool.size))
    idle, running = list(range(pool.size)), dict[Any, tuple[int, list[int]]]()
    chunks: dict[int, list[list[int]]] = {}
    done: dict[int, list[Any]] = {}
    while any(queues.values()) or running:
        for slot in list(idle):
            queue = queues.get(pool.kind_of(slot))
            if queue:
                idle.remove(slot)
                size = max(1, len(queue) // (CHUNKS_PER_SLOT * slots[pool.kind_of(slot)]))
                chunk = [queue.popleft() for _ in range(size)]
                running[call(pool.actors[slot], chunk)] = (slot, chunk)
        (ready,), _ = ray.wait(list(running), num_returns=1)
        slot, chunk = running.pop(ready)
        try:
            done.setdefault(slot, []).extend(ray.get(ready))
            chunks.setdefault(slot, []).append(chunk)
        except LOST as error:
            for lost in (chunk, *chunks.pop(slot, [])):
                queues[pool.kind_of(slot)].extend(lost)
            done.pop(slot, None)
            pool.replace(slot, error)
        idle.append(slot)
    return done
