"""The server of secure aggregation in the driver: relays between slots, adds what is masked, and unmasks the sum.

It never holds an unmasked update: secrets and vectors stay in the slots (see secure.py). Every message that it relays
is counted for the ledger, by whom it reaches.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from engine.secure import Opening
from engine.slots import LOST, Reference, Slots
from engine.wire import Report
from strategies.secagg.messages import KeyList, MaskedSum
from strategies.secagg.protocol import Phase, SecAggAbort, Session
from strategies.secagg.ring import Totals
from strategies.secagg.server import Server

Gone = Mapping[int, Phase]  # who drops out, and before which answer
Placed = dict[int, tuple[int, ...]]  # a slot's clients


class _SlotLost(Exception):
    """A slot died with its clients' secrets: the session is void."""


@dataclass(frozen=True)
class Message:
    """`count` messages of a kind that reached a party, of `nbytes` together."""

    party: str
    kind: str
    count: int
    nbytes: int


@dataclass
class Relayed:
    """What came of a secured round: reports, the sums, or why there are none; and all messages, void sessions' too."""

    reports: list[Report] = field(default_factory=list)
    totals: Totals | None = None
    aborted: str | None = None
    sessions: int = 0
    messages: list[Message] = field(default_factory=list)

    def note(self, party: str, kind: str, sent: Iterable[Any]) -> None:
        """Counts messages; whatever has `nbytes` is one."""
        sizes = [one.nbytes for one in sent]
        if sizes:
            self.messages.append(Message(party, kind, len(sizes), sum(sizes)))


@dataclass(frozen=True)
class Relay:
    """Plays secured rounds on a pool of slots. `authority` vouches for identities in the active profile."""

    slots: Slots
    authority: Any
    on_slot_death: str

    def play(
        self, session: Session, cohort: np.ndarray, costs: np.ndarray, wire: Reference, gone: Gone, least: int
    ) -> Relayed:
        """One round: `cohort` (N,) trains from `wire`, `costs` (N,) place clients, at least `least` must survive.

        A slot that dies voids the session, and the next one has new keys; ValueError where too many die.
        """
        done = Relayed()
        placed = placement(cohort, costs, self.slots.size)
        self.slots.deaths = 0
        while True:
            done.sessions += 1
            try:
                done.totals = self._session(session, placed, wire, gone, least, done)
                return done
            except _SlotLost:
                session = replace(session, attempt=session.attempt + 1)
            except SecAggAbort as abort:
                done.aborted = str(abort)
                return done

    def _session(
        self,
        session: Session,
        placed: dict[int, tuple[int, ...]],
        wire: Reference,
        gone: Gone,
        least: int,
        done: Relayed,
    ) -> Totals:
        cohort = tuple(sorted(client for clients in placed.values() for client in clients))
        known = None
        if session.parameters.active:
            known = self.slots.ask(lambda actor: actor.roster.remote(cohort, self.authority))
        server = Server(session, cohort, roster=known)
        opened = {slot: Opening(session, cohort, clients, gone) for slot, clients in placed.items()}
        keys = self._flat(self._trip(opened, lambda actor, mine: actor.open.remote(mine, self.authority)))
        done.note("server", "key", keys)
        listed: KeyList = server.key_list(keys)
        done.note("client", "key", [listed] * len(keys))

        shared = ray.put(listed)
        shares = self._flat(self._trip(placed, lambda actor, _: actor.shares.remote(shared)))
        done.note("server", "sealed share", shares)
        inboxes = server.inboxes(shares)
        done.note("other clients", "share", inboxes.values())

        boxes = {slot: {c: inboxes[c] for c in clients if c in inboxes} for slot, clients in placed.items()}
        found = self._trip({s: box for s, box in boxes.items() if box}, lambda a, box: a.masked.remote(box, wire))
        done.reports = sorted((r for reports, _ in found.values() for r in reports), key=lambda report: report.client)
        masked: list[MaskedSum] = [one for _, one in found.values() if one.clients]
        for one in masked:
            done.messages.append(Message("server", "masked update", len(one.clients), one.nbytes))
            server.add(one)
        survivors = server.survivors()
        if len(survivors.clients) < least:
            raise SecAggAbort("masked input", f"{len(survivors.clients)} clients are left, and it takes {least}")

        agreements = []
        if session.parameters.active:
            done.note("client", "survivors", [survivors] * len(survivors.clients))
            agreements = self._flat(self._trip(placed, lambda actor, _: actor.agree.remote(survivors)))
            done.note("server", "signature", agreements)
        requests = server.requests(agreements)
        done.note("client", "survivors", requests.values())
        asked = {slot: {c: requests[c] for c in clients if c in requests} for slot, clients in placed.items()}
        answers = self._flat(self._trip({s: r for s, r in asked.items() if r}, lambda a, r: a.unmask.remote(r)))
        done.note("server", "share", answers)
        server.unmask(answers)
        total_L = server.total()
        done.messages.append(Message("server", "sum", 1, session.sums.nbytes))
        return session.sums.decode(total_L)

    def _trip(self, given: Mapping[int, Any], call: Callable[[Any, Any], Reference]) -> dict[int, Any]:
        """What each slot answers to what it is given; of one that dies nothing, or _SlotLost once all have answered."""
        asked = {slot: call(self.slots.actors[slot], mine) for slot, mine in given.items()}
        found, lost = {}, False
        for slot, reference in asked.items():
            try:
                found[slot] = ray.get(reference)
            except LOST as error:
                self.slots.replace(slot, error)
                lost = True
            except RayTaskError as error:
                if isinstance(error.cause, SecAggAbort):
                    raise error.cause from error
                raise
        if lost and self.on_slot_death == "void":
            raise _SlotLost
        return found

    @staticmethod
    def _flat(found: Mapping[int, list[Any]]) -> list[Any]:
        return [one for answers in found.values() for one in answers]


def placement(cohort: np.ndarray, costs: np.ndarray, slots: int) -> Placed:
    """Each slot's clients: the longest work first, to the slot with the least; slots without any are left out."""
    loads, placed = np.zeros(slots), dict[int, list[int]]()
    for place in np.argsort(-costs, kind="stable"):
        slot = int(np.argmin(loads))
        loads[slot] += costs[place]
        placed.setdefault(slot, []).append(int(cohort[place]))
    return {slot: tuple(clients) for slot, clients in placed.items()}
