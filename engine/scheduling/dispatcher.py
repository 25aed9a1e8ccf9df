"""Slots pull chunks of work: whoever is idle takes some, and what a dead slot had done is handed out again.

A unit of work is a pack of clients, which train together, or one client.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError

from engine.messages.events import Fault
from engine.messages.tasks import Unit, halves
from engine.messages.wire import Report
from engine.system.failures import LOST, SlotSilent, last_line

if TYPE_CHECKING:
    from engine.scheduling.slots import Slots

SHARES = 1.5  # of each slot in the work that is left: a third of it is always held back, for whoever is done first
LATER_SHARES = 2  # of each slot in work that can wait
LEAST_S = 0.005  # of work in a chunk, where there is so much: to hand one out takes about a tenth of that
AHEAD = 2  # chunks that a slot has at once, so that it need not wait for the next
REFILLED = 2  # packs hold so many clients a lane, where there are enough of them: who ends early is followed by another
ENOUGH = 16  # packs of a cohort, so that slots stay in balance


@dataclass(frozen=True)
class Worked:
    """A round's local work: reports, sorted, sums that hold each client once, and references to updates by client.

    There are such references only where the strategy reads more than sums. `nbytes` is what the sums took in the
    object store, `busy` are the slots' seconds of work.
    """

    reports: list[Report]
    sums: list[Any]
    nbytes: int
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
        return cls(deque(part.tolist() for part in np.array_split(clients, LATER_SHARES * slots) if len(part)), call)


def packs(clients: np.ndarray, steps: np.ndarray, lanes: int) -> list[Unit]:
    """The clients (N,) in packs for so many lanes: by their numbers of steps (N,) and nothing else.

    Clients of about as many steps come together, and packs are of about one size.
    """
    ordered = clients[np.argsort(-steps, kind="stable")]
    members = lanes if lanes == 1 or len(clients) < ENOUGH * REFILLED * lanes else REFILLED * lanes
    cut = np.array_split(ordered, -(-len(ordered) // members)) if len(ordered) else []
    return [tuple(pack.tolist()) for pack in cut]


@dataclass
class Done:
    """What a slot has done that still lives: results, and of which units."""

    results: list[Any] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)


class Pull:
    """Slots pull `units` of work, the longest (by their `cost`, best in seconds) first, until all are done.

    A chunk is a share of the work that is left, so that chunks shrink towards the end, but not to what is over at
    once, and no more than what half of `clients.timeout_s` is thought to be enough for. Slots that have nothing else to
    do take what is `later`. What a slot was working on when it died is handed out unit by unit: one that ends slots
    again and again is halved if it is a pack, and a client alone gets the results of `give_up`, or ends the run. What
    slots had `done` before is theirs still, and dies with them as well.
    """

    def __init__(
        self,
        pool: Slots,
        units: list[Unit],
        cost: Callable[[Unit], float],
        call: Callable[[Any, list[Unit]], Any],
        later: list[Later] | None = None,
        give_up: Callable[[int, str], Any] | None = None,
        done: dict[int, Done] | None = None,
    ) -> None:
        self.pool, self.call, self.later, self.give_up = pool, call, later or [], give_up
        self.done = done or {}
        known = [*units, *(unit for own in self.done.values() for unit in own.units)]
        self.cost = {unit: cost(unit) for unit in known}
        kinds = pool.kinds(np.array([unit[0] for unit in known], np.int64))
        self.kind = dict(zip(known, kinds.tolist(), strict=True))
        self.queues: dict[int, deque[Unit]] = {kind: deque() for kind in self.kind.values()}
        self.left = dict.fromkeys(self.queues, 0.0)
        for place in np.argsort([-self.cost[unit] for unit in units], kind="stable"):
            self._queue(units[place])
        self.slots = Counter(pool.kind_of(slot) for slot in pool.alive)
        self.free = dict.fromkeys(pool.alive, AHEAD)
        self.running: dict[Any, tuple[int, list[Unit]]] = {}
        self.beside: dict[Any, tuple[int, Later, list[int]]] = {}
        self.since: dict[int, float] = {}  # when a slot began to owe an answer
        self.suspects: Counter[Unit] = Counter()  # how many slots have died while they worked on a unit alone
        self.most = self._finished()  # units that were done at once
        self.slowest = 0.0  # seconds for what is thought to take one, of the chunks so far
        self.given_up: list[Any] = []

    def run(self) -> dict[int, Done]:
        """What each slot that is still alive has done."""
        while self._busy() or self.running or self.beside:
            self._hand_out()
            owed = [*self.running, *self.beside]
            if not owed:
                continue
            ready, _ = ray.wait(owed, num_returns=1, timeout=self._patience())
            if ready:
                self._take(ready[0])
            else:
                self._end_silent()  # and then take what others have answered meanwhile
        return self.done

    def _busy(self) -> bool:
        return any(self.queues.values())

    def _queue(self, unit: Unit) -> None:
        self.queues[self.kind[unit]].append(unit)
        self.left[self.kind[unit]] += self.cost[unit]

    def _hand_out(self) -> None:
        # Behind a suspect nothing waits: what a slot has ended a moment before its death may not have been told.
        for ahead in range(1 if self.suspects else AHEAD):
            for slot in [slot for slot, room in self.free.items() if room == AHEAD - ahead]:
                kind = self.pool.kind_of(slot)
                # The last units are for who has nothing else to do.
                if len(self.queues.get(kind, ())) > ahead * AHEAD * self.slots[kind]:
                    chunk = self._chunk(kind)
                    self.running[self.call(self.pool.actors[slot], chunk)] = (slot, chunk)
                    self._owes(slot)
        # Once the training is over, what is later is no part of the round.
        for slot in [slot for slot, room in self.free.items() if room == AHEAD and (self.running or self._busy())]:
            waiting = next((one for one in self.later if one.chunks), None)
            if waiting is not None:
                part = waiting.chunks.popleft()
                self.beside[waiting.call(self.pool.actors[slot], part)] = (slot, waiting, part)
                self._owes(slot)

    def _owes(self, slot: int) -> None:
        self.free[slot] -= 1
        self.since.setdefault(slot, time.monotonic())

    def _chunk(self, kind: int) -> list[Unit]:
        queue, share, chunk, took = self.queues[kind], self._share(kind), list[Unit](), 0.0
        while queue and (not chunk or took + self.cost[queue[0]] <= share):
            if chunk and (queue[0] in self.suspects or chunk[0] in self.suspects):
                break
            chunk.append(queue.popleft())
            took += self.cost[chunk[-1]]
        self.left[kind] -= took
        return chunk

    def _share(self, kind: int) -> float:
        share, allowed = self.left[kind] / (SHARES * self.slots[kind]), self.pool.timeout_s
        share = max(LEAST_S, share)
        # Half of it is for who takes longer than thought. In other units than seconds a first chunk is rather short.
        return share if allowed is None else min(share, allowed / 2 / (self.slowest or 1.0))

    def _patience(self) -> float | None:
        allowed = self.pool.timeout_s
        return None if allowed is None else max(0.0, min(self.since.values()) + allowed - time.monotonic())

    def _end_silent(self) -> None:
        allowed = self.pool.timeout_s
        assert allowed is not None
        slot = min(self.since, key=self.since.__getitem__)
        self._lose(slot, SlotSilent(f"no answer for {allowed:g} s, which is clients.timeout_s"))

    def _take(self, ready: Any) -> None:
        slot = (self.beside.get(ready) or self.running[ready])[0]
        try:
            found = ray.get(ready)
        except LOST as error:
            self._lose(slot, error)
            return
        self.free[slot] += 1
        if ready in self.beside:
            _, waiting, _ = self.beside.pop(ready)
            waiting.found.extend(found)
        else:
            _, chunk = self.running.pop(ready)
            took = time.monotonic() - self.since[slot]
            # One that was slow is not for ever what others are measured by.
            self.slowest = max(self.slowest / 2, took / max(1e-9, sum(self.cost[unit] for unit in chunk)))
            for unit in chunk:
                self.suspects.pop(unit, None)
            done = self.done.setdefault(slot, Done())
            done.results.extend(found)
            done.units.extend(chunk)
            self._count()
        if self.free[slot] == AHEAD:
            del self.since[slot]
        else:
            self.since[slot] = time.monotonic()

    def _count(self) -> None:
        """Forgives the deaths before where more is done than ever was, to which what always dies does not come."""
        finished = self._finished()
        if finished > self.most:
            self.most, self.pool.deaths = finished, 0

    def _finished(self) -> int:
        return sum(len(own.units) for own in self.done.values())

    def _lose(self, slot: int, error: Exception) -> None:
        """All that a dead slot has done or begun is to be done again, but for what it has answered of `later`."""
        begun = [self.running.pop(reference)[1] for reference, (other, _) in [*self.running.items()] if other == slot]
        for reference in [reference for reference, (other, _, _) in self.beside.items() if other == slot]:
            _, waiting, part = self.beside.pop(reference)
            waiting.chunks.append(part)
        for unit in self.done.pop(slot, Done()).units:
            self._queue(unit)
        # A slot answers in the order in which it is asked: the first is what it was working on when it ended, if it was
        # that and not its node which did.
        outside = isinstance(error, ActorUnavailableError) or self.pool.lost_with_node(slot)
        suspected = [] if outside else begun[:1]
        for chunk in begun[len(suspected) :]:
            for unit in chunk:
                self._queue(unit)
        for chunk in suspected:
            self._suspect(chunk, error)
        self.since.pop(slot, None)
        self.pool.replace(slot, error)
        self.free[slot] = AHEAD
        for gone in [other for other in self.free if other not in self.pool.alive]:
            del self.free[gone]
        self.slots = Counter(self.pool.kind_of(other) for other in self.pool.alive)

    def _suspect(self, chunk: list[Unit], error: Exception) -> None:
        if len(chunk) > 1:
            self.suspects.update(dict.fromkeys(chunk, 0))
            for unit in chunk:
                self._queue(unit)
            return
        (unit,) = chunk
        self.suspects[unit] += 1
        again = self.suspects[unit] > self.pool.federation.clients.retries
        if len(unit) > 1 and (again or isinstance(error, OutOfMemoryError)):
            why = f"halved, since its slots died of it: {last_line(error)}"
            self.pool.faults.append(Fault("pack", ", ".join(map(str, unit)), why))
            for half in halves(unit):
                self.cost[half], self.kind[half] = self.cost[unit] * len(half) / len(unit), self.kind[unit]
                self.suspects[half] = 0
                self._queue(half)
        elif len(unit) == 1 and self.give_up and again:
            self.given_up.append(self.give_up(unit[0], last_line(error)))
        else:
            self._queue(unit)
