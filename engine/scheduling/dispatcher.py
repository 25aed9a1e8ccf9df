"""Slots pull chunks of work: units of one client or of several in lanes; a dead slot's work is done again."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError

from engine.config.federation import Federation
from engine.messages.events import Fault
from engine.messages.reports import Report
from engine.messages.tasks import Unit, halves
from engine.system.failures import LOST, SlotSilent, last_line

SHARES = 1.5  # chunks for each slot in the work that is left: a first chunk is 2/3 of an even share
LEAST_S = 0.005  # of work in a chunk, if there is as much: to hand one out takes about a tenth of that
AHEAD = 2  # chunks that a slot has at once, so that it need not wait for the next
REFILLED = 2  # clients for each lane of a unit, if there are enough: when one ends early, another follows
ENOUGH = 16  # units of a cohort, so that slots stay in balance


@dataclass(frozen=True)
class Worked:
    """A round's local work: reports, sorted, and sums that hold each client once."""

    reports: list[Report]
    sums: list[Any]
    nbytes: int  # that the sums took in the object store
    each: dict[int, Any]  # references to updates by client, where the strategy reads more than sums
    busy: list[float]  # seconds of work by slot


@dataclass
class Later:
    """Work on clients that waits until slots have nothing else to do."""

    chunks: deque[list[int]]
    call: Callable[[Any, list[int]], Any]
    results: list[Any] = field(default_factory=list)


def units_of(clients: np.ndarray, steps: np.ndarray, lanes: int) -> list[Unit]:
    """Groups the clients (N,) into units of about one size, by their numbers of steps (N,) and nothing else."""
    ordered = clients[np.argsort(-steps, kind="stable")]
    members = lanes if lanes == 1 or len(clients) < ENOUGH * REFILLED * lanes else REFILLED * lanes
    units = np.array_split(ordered, -(-len(ordered) // members)) if len(ordered) else []
    return [tuple(unit.tolist()) for unit in units]


@dataclass
class SlotResults:
    """What a slot that still lives has finished: results, and of which units."""

    results: list[Any] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)


class _Slots(Protocol):
    """What a dispatcher asks of a Pool, which documents it."""

    federation: Federation
    kind_of: list[int]
    actors: list[Any]
    alive: list[int]
    faults: list[Fault]
    deaths: int

    @property
    def timeout_s(self) -> float | None: ...
    def kinds_for(self, clients: np.ndarray) -> np.ndarray: ...
    def lost_with_node(self, slot: int) -> bool: ...
    def replace(self, slot: int, error: Exception) -> None: ...


class Dispatcher:
    """Hands out `units` of work, the longest (by their `cost`, best in seconds) first, until all are done.

    A chunk is a share of the work that is left, so that chunks shrink towards the end. Idle slots take work of `later`.
    What a slot was working on when it died is handed out unit by unit. A unit that ends slots again and again is halved
    if it has several clients; a single client gets the result of `give_up`. What slots have `finished` before is lost
    with them as well.
    """

    def __init__(
        self,
        slots: _Slots,
        units: list[Unit],
        cost: Callable[[Unit], float],
        call: Callable[[Any, list[Unit]], Any],
        later: list[Later] | None = None,
        give_up: Callable[[int, str], Any] | None = None,
        finished: dict[int, SlotResults] | None = None,
    ) -> None:
        self.slots, self.call, self.later, self.give_up = slots, call, later or [], give_up
        self.finished = finished or {}
        known = [*units, *(unit for of_slot in self.finished.values() for unit in of_slot.units)]
        self.cost = {unit: cost(unit) for unit in known}
        kinds = slots.kinds_for(np.array([unit[0] for unit in known], np.int64))
        self.kind = dict(zip(known, kinds.tolist(), strict=True))
        self.queues: dict[int, deque[Unit]] = {kind: deque() for kind in self.kind.values()}
        self.left = dict.fromkeys(self.queues, 0.0)
        for place in np.argsort([-self.cost[unit] for unit in units], kind="stable"):
            self._queue(units[place])
        self.living = Counter(slots.kind_of[slot] for slot in slots.alive)  # slots by kind
        self.free = dict.fromkeys(slots.alive, AHEAD)
        self.running: dict[Any, tuple[int, list[Unit]]] = {}
        self.beside: dict[Any, tuple[int, Later, list[int]]] = {}
        self.since: dict[int, float] = {}  # when a slot began to owe an answer
        self.suspects: Counter[Unit] = Counter()  # how many slots have died while they worked on a unit alone
        self.most = self._count_finished()  # units that were finished at once
        self.slowest = 0.0  # seconds for what was expected to take one, of the chunks so far
        self.given_up: list[Any] = []

    def run(self) -> dict[int, SlotResults]:
        """Returns what each slot that is still alive has finished."""
        allowed = self.slots.timeout_s
        while self._busy() or self.running or self.beside:
            self._hand_out()
            owed = [*self.running, *self.beside]
            patience = allowed and max(0.0, min(self.since.values()) + allowed - time.monotonic())
            ready, _ = ray.wait(owed, num_returns=1, timeout=patience)
            if ready:
                self._take(ready[0])
            else:  # end a silent slot, and then take what others have answered meanwhile
                why = f"no answer for {allowed:g} s, which is clients.timeout_s"
                self._lose(min(self.since, key=self.since.__getitem__), SlotSilent(why))
        return self.finished

    def _busy(self) -> bool:
        return any(self.queues.values())

    def _queue(self, unit: Unit) -> None:
        self.queues[self.kind[unit]].append(unit)
        self.left[self.kind[unit]] += self.cost[unit]

    def _hand_out(self) -> None:
        # While units are suspects, a slot gets one chunk at a time: a dying slot may lose its last answer.
        for ahead in range(1 if self.suspects else AHEAD):
            for slot in [slot for slot, room in self.free.items() if room == AHEAD - ahead]:
                kind = self.slots.kind_of[slot]
                # The last units are for slots that have nothing else to do.
                if len(self.queues.get(kind, ())) > ahead * AHEAD * self.living[kind]:
                    chunk = self._chunk(kind)
                    self.running[self.call(self.slots.actors[slot], chunk)] = (slot, chunk)
                    self._owes(slot)
        # Once the training is over, no more of `later` is handed out here.
        for slot in [slot for slot, room in self.free.items() if room == AHEAD and (self.running or self._busy())]:
            waiting = next((later for later in self.later if later.chunks), None)
            if waiting is not None:
                clients = waiting.chunks.popleft()
                self.beside[waiting.call(self.slots.actors[slot], clients)] = (slot, waiting, clients)
                self._owes(slot)

    def _owes(self, slot: int) -> None:
        self.free[slot] -= 1
        self.since.setdefault(slot, time.monotonic())

    def _chunk(self, kind: int) -> list[Unit]:
        share, allowed = max(LEAST_S, self.left[kind] / (SHARES * self.living[kind])), self.slots.timeout_s
        if allowed is not None:
            # Half is left for work that takes longer than expected. If costs are not seconds, a first chunk is short.
            share = min(share, allowed / 2 / (self.slowest or 1.0))
        queue, chunk, cost = self.queues[kind], list[Unit](), 0.0
        while queue and (not chunk or cost + self.cost[queue[0]] <= share):
            if chunk and (queue[0] in self.suspects or chunk[0] in self.suspects):
                break
            chunk.append(queue.popleft())
            cost += self.cost[chunk[-1]]
        self.left[kind] -= cost
        return chunk

    def _take(self, ready: Any) -> None:
        slot = (self.beside.get(ready) or self.running[ready])[0]
        try:
            results = ray.get(ready)
        except LOST as error:
            self._lose(slot, error)
            return
        self.free[slot] += 1
        if ready in self.beside:
            _, waiting, _ = self.beside.pop(ready)
            waiting.results.extend(results)
        else:
            _, chunk = self.running.pop(ready)
            took = time.monotonic() - self.since[slot]
            # A chunk that was slow is not the measure of the others for ever.
            self.slowest = max(self.slowest / 2, took / max(1e-9, sum(self.cost[unit] for unit in chunk)))
            for unit in chunk:
                self.suspects.pop(unit, None)
            finished = self.finished.setdefault(slot, SlotResults())
            finished.results.extend(results)
            finished.units.extend(chunk)
            # Work that always dies does not get beyond what was finished before.
            if (count := self._count_finished()) > self.most:
                self.most, self.slots.deaths = count, 0
        if self.free[slot] == AHEAD:
            del self.since[slot]
        else:
            self.since[slot] = time.monotonic()

    def _count_finished(self) -> int:
        return sum(len(of_slot.units) for of_slot in self.finished.values())

    def _lose(self, slot: int, error: Exception) -> None:
        """Queues again all that a dead slot has done or begun, but for what it has answered of `later`."""
        begun = [self.running.pop(reference)[1] for reference, (other, _) in [*self.running.items()] if other == slot]
        for reference, (other, waiting, clients) in [*self.beside.items()]:
            if other == slot:
                del self.beside[reference]
                waiting.chunks.append(clients)
        for unit in self.finished.pop(slot, SlotResults()).units:
            self._queue(unit)
        # A slot answers in the order in which it is asked: it was working on the first chunk when it ended, and the
        # chunk may be at fault unless the slot's node has ended.
        suspected = [] if isinstance(error, ActorUnavailableError) or self.slots.lost_with_node(slot) else begun[:1]
        for unit in chain.from_iterable(begun[len(suspected) :]):
            self._queue(unit)
        for chunk in suspected:
            self._suspect(chunk, error)
        self.since.pop(slot, None)
        self.slots.replace(slot, error)
        self.free[slot] = AHEAD
        self.free = {other: room for other, room in self.free.items() if other in self.slots.alive}
        self.living = Counter(self.slots.kind_of[other] for other in self.slots.alive)

    def _suspect(self, chunk: list[Unit], error: Exception) -> None:
        if len(chunk) > 1:
            self.suspects.update(dict.fromkeys(chunk, 0))
            for unit in chunk:
                self._queue(unit)
            return
        (unit,) = chunk
        self.suspects[unit] += 1
        again = self.suspects[unit] > self.slots.federation.clients.retries
        if len(unit) > 1 and (again or isinstance(error, OutOfMemoryError)):
            why = f"halved, since its slots died of it: {last_line(error)}"
            self.slots.faults.append(Fault("lanes", ", ".join(map(str, unit)), why))
            for half in halves(unit):
                self.cost[half], self.kind[half] = self.cost[unit] * len(half) / len(unit), self.kind[unit]
                self.suspects[half] = 0
                self._queue(half)
        elif len(unit) == 1 and self.give_up and again:
            self.given_up.append(self.give_up(unit[0], last_line(error)))
        else:
            self._queue(unit)
