"""Slots pull chunks of work: whoever is idle takes some, and what a dead slot had done is handed out again.

A unit of work is a pack of clients, which train together, or one client.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from engine.lost import LOST
from engine.wire import Report

if TYPE_CHECKING:
    from engine.slots import Slots

Unit = tuple[int, ...]
CHUNKS_PER_SLOT = 4
AHEAD = 2  # chunks that a slot has at once, so that it need not wait for the next
REFILLED = 2  # packs hold so many clients a lane, where there are enough of them: who ends early is followed by another
ENOUGH = 16  # packs of a cohort, so that slots stay in balance


@dataclass(frozen=True)
class Work:
    """A round's clients (N,), the steps that each takes (N,), and how long it is thought to take (N,), in any unit."""

    clients: np.ndarray
    steps: np.ndarray
    costs: np.ndarray

    def of(self, some: np.ndarray) -> Work:
        """The same of some of the clients: a mask (N,)."""
        return Work(self.clients[some], self.steps[some], self.costs[some])

    def cost(self, unit: Unit) -> float:
        """How long a unit is thought to take."""
        return sum(self._each[client] for client in unit)

    @cached_property
    def _each(self) -> dict[int, float]:
        return dict(zip(self.clients.tolist(), self.costs.tolist(), strict=True))


@dataclass(frozen=True)
class Worked:
    """A round's local work: reports, sorted, sums that hold each client once, and references to updates by client.

    There are such references only where the strategy reads more than sums. `busy` are the slots' seconds of work.
    """

    reports: list[Report]
    sums: list[Any]
    each: dict[int, Any]
    busy: list[float]


@dataclass
class Later:
    """Work on clients that waits until slots have nothing else to do: its chunks, how to call, and what was found."""

    chunks: deque[list[int]]
    call: Callable[[Any, list[int]], Any]
    found: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, clients: np.ndarray, slots: int, call: Callable[[Any, list[int]], Any]) -> Later:
        """The clients (N,) in a few chunks for each slot."""
        return cls(deque(part.tolist() for part in np.array_split(clients, CHUNKS_PER_SLOT * slots) if len(part)), call)


def packs(clients: np.ndarray, steps: np.ndarray, lanes: int) -> list[Unit]:
    """The clients (N,) in packs for so many lanes: by their numbers of steps (N,) and nothing else.

    Clients of about as many steps come together, and packs are of about one size.
    """
    ordered = clients[np.argsort(-steps, kind="stable")]
    members = lanes if lanes == 1 or len(clients) < ENOUGH * REFILLED * lanes else REFILLED * lanes
    cut = np.array_split(ordered, -(-len(ordered) // members)) if len(ordered) else []
    return [tuple(pack.tolist()) for pack in cut]


def pull(
    pool: Slots,
    units: list[Unit],
    costs: list[float],
    call: Callable[[Any, list[Unit]], Any],
    later: list[Later] | None = None,
) -> dict[int, list[Any]]:
    """What each slot that is still alive has done of `units`, the longest work (`costs`, in any unit) first.

    A chunk is a share of the work that is left, so that chunks shrink towards the end. Slots that have nothing else to
    do take what is `later`.
    """
    cost = dict(zip(units, costs, strict=True))
    kinds = pool.kinds(np.array([unit[0] for unit in units], np.int64))
    queues: dict[int, deque[Unit]] = {}
    for place in np.argsort(-np.array(costs), kind="stable"):
        queues.setdefault(int(kinds[place]), deque()).append(units[place])
    left = {kind: sum(cost[unit] for unit in queue) for kind, queue in queues.items()}
    slots = Counter(pool.kind_of(slot) for slot in range(pool.size))
    free, running = dict.fromkeys(range(pool.size), AHEAD), dict[Any, tuple[int, list[Unit]]]()
    beside: dict[Any, tuple[int, Later, list[int]]] = {}
    chunks: dict[int, list[list[Unit]]] = {}
    done: dict[int, list[Any]] = {}

    def taken(kind: int) -> list[Unit]:
        queue, share, chunk = queues[kind], left[kind] / (CHUNKS_PER_SLOT * slots[kind]), list[Unit]()
        took = 0.0
        while queue and (not chunk or took + cost[queue[0]] <= share):
            chunk.append(queue.popleft())
            took += cost[chunk[-1]]
        left[kind] -= took
        return chunk

    def lose(slot: int, error: Exception, *own: list[Unit]) -> None:
        """All that a dead slot has done or begun is to be done again, but for what it has answered of `later`."""
        begun = [reference for reference, (other, _) in running.items() if other == slot]
        kind = pool.kind_of(slot)
        for lost in (*own, *(running.pop(reference)[1] for reference in begun), *chunks.pop(slot, [])):
            queues[kind].extend(lost)
            left[kind] += sum(cost[unit] for unit in lost)
        for reference in [reference for reference, (other, _, _) in beside.items() if other == slot]:
            _, waiting, part = beside.pop(reference)
            waiting.chunks.append(part)
        done.pop(slot, None)
        pool.replace(slot, error)
        free[slot] = AHEAD

    while any(queues.values()) or running or beside:
        for ahead in range(AHEAD):
            for slot in [slot for slot, room in free.items() if room == AHEAD - ahead]:
                kind = pool.kind_of(slot)
                # The last units are for who has nothing else to do.
                if len(queues.get(kind, ())) > ahead * AHEAD * slots[kind]:
                    free[slot] -= 1
                    chunk = taken(kind)
                    running[call(pool.actors[slot], chunk)] = (slot, chunk)
        # Once the training is over, what is later is no part of the round.
        for slot in [slot for slot, room in free.items() if room == AHEAD and (running or any(queues.values()))]:
            waiting = next((one for one in later or () if one.chunks), None)
            if waiting is not None:
                free[slot] -= 1
                part = waiting.chunks.popleft()
                beside[waiting.call(pool.actors[slot], part)] = (slot, waiting, part)
        (ready,), _ = ray.wait([*running, *beside], num_returns=1)
        if ready in beside:
            slot, waiting, part = beside.pop(ready)
            free[slot] += 1
            try:
                waiting.found.extend(ray.get(ready))
            except LOST as error:
                waiting.chunks.append(part)
                lose(slot, error)
            continue
        slot, chunk = running.pop(ready)
        try:
            done.setdefault(slot, []).extend(ray.get(ready))
            chunks.setdefault(slot, []).append(chunk)
            free[slot] += 1
        except LOST as error:
            lose(slot, error, chunk)
    return done
