"""The server of secure aggregation in the driver: relays between slots, adds what is masked, and unmasks the sum.

It never holds an unmasked update: secrets and vectors stay in the slots (see secure.py). Every message that it relays
is counted for the ledger, by whom it reaches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from engine.aggregation.secure_clients import Opening
from engine.messages.reports import Report
from engine.messages.shards import ShardTotals
from engine.messages.tasks import Unit, Work
from engine.scheduling.pool import Pool
from engine.scheduling.worker_kinds import Reference
from engine.system.failures import LOST, within
from strategies.secagg.messages import KeyList, MaskedSum
from strategies.secagg.protocol import Phase, SecAggAbort, Session
from strategies.secagg.ring import Totals
from strategies.secagg.server import Server

Gone = Mapping[int, Phase]  # who drops out, and before which answer
Placed = dict[int, tuple[Unit, ...]]  # a slot's packs


class _SlotLost(Exception):
    """A slot died with its clients' secrets: the session is void."""


@dataclass(frozen=True)
class _Asked:
    """What all sessions of a round have in common; `known` are the public identities in the active profile."""

    placed: Placed
    wire: Reference
    gone: Gone
    refuse: Callable[[Sequence[int], Sequence[Report]], None]
    admit: Callable[[Sequence[int]], None]
    known: dict[int, bytes] | None


@dataclass(frozen=True)
class Message:
    """`count` messages of a kind that reached a party, of `nbytes` together."""

    party: str
    kind: str
    count: int
    nbytes: int


@dataclass
class Relayed:
    """What came of a secured round: reports, the sums, or why there are none; and all messages, void sessions' too.

    `lost` are clients whose slot died before it gave their masked sum, where that counts as dropping out.
    """

    reports: list[Report] = field(default_factory=list)
    lost: tuple[int, ...] = ()
    totals: Totals | ShardTotals | None = None
    aborted: str | None = None
    sessions: int = 0
    busy: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def note(self, party: str, kind: str, sent: Iterable[Any]) -> None:
        """Counts messages; whatever has `nbytes` is one."""
        sizes = [one.nbytes for one in sent]
        if sizes:
            self.messages.append(Message(party, kind, len(sizes), sum(sizes)))


@dataclass(frozen=True)
class Relay:
    """Plays secured rounds on a pool of slots. `authority` vouches for identities in the active profile."""

    slots: Pool
    authority: Any
    on_slot_death: str

    def play(
        self,
        session: Session,
        work: Work,
        wire: Any,
        lanes: int,
        gone: Gone,
        refuse: Callable[[Sequence[int], Sequence[Report]], None],
        admit: Callable[[Sequence[int]], None],
    ) -> Relayed:
        """One round of secured `work` from `wire`; survivors and reports must pass `refuse`, which may be asked again.

        `admit` is asked once, just before clients are asked for the shares that unmask the survivors' sum. Both refuse
        by ValueError, and the round has no result.

        A slot that dies before the sum is being unmasked voids the session, and the next one has new keys; ValueError
        where too many die. Once clients have been asked for shares, nothing is void: a second sum beside the first
        could tell what is between them.
        """
        done = Relayed()
        units, shared = self.slots.units(work, lanes), self._shared(wire)
        known = None
        if session.parameters.active:
            everybody = tuple(work.clients.tolist())
            known = self.slots.ask(lambda actor: actor.roster.remote(everybody, self.authority))
        self.slots.deaths = 0
        while True:
            done.sessions += 1
            placed = placement(units, [work.cost(unit) for unit in units], self.slots.alive)
            asked = _Asked(placed, shared, gone, refuse, admit, known)
            try:
                done.totals = self._session(session, asked, done)
                return done
            except _SlotLost:
                session = replace(session, attempt=session.attempt + 1)
            except SecAggAbort as abort:
                done.aborted = str(abort)
                return done

    def _session(self, session: Session, asked: _Asked, done: Relayed) -> Totals | ShardTotals:
        placed = asked.placed
        members = {slot: [client for pack in packs for client in pack] for slot, packs in placed.items()}
        cohort = tuple(sorted(client for clients in members.values() for client in clients))
        server = Server(session, cohort, self.slots.held(session.sums), asked.known)
        opened = {slot: Opening(session, cohort, packs, asked.gone) for slot, packs in placed.items()}
        answered = self._trip("open", opened, self.authority)
        keys = self._flat(answered)
        done.note("server", "key", keys)
        listed: KeyList = server.key_list(keys)
        done.note("client", "key", [listed] * len(keys))

        answered = self._trip("shares", dict.fromkeys(answered, self._shared(listed)))
        shares = self._flat(answered)
        done.note("server", "sealed share", shares)
        inboxes = server.inboxes(shares)
        sealed = [len(inbox.boxes) for inbox in inboxes.values()], [inbox.nbytes for inbox in inboxes.values()]
        done.messages.append(Message("other clients", "share", sum(sealed[0]), sum(sealed[1])))

        boxes = {slot: {c: inboxes[c] for c in members[slot] if c in inboxes} for slot in answered}
        found = self._trip("masked", {slot: box for slot, box in boxes.items() if box}, asked.wire)
        done.reports = sorted((r for reports, _ in found.values() for r in reports), key=lambda report: report.client)
        silent = [client for slot, clients in members.items() if slot not in found for client in clients]
        done.lost = tuple(client for client in silent if client not in asked.gone)
        done.busy = [0.0] * self.slots.size
        for slot, (reports, _) in found.items():
            done.busy[slot] = sum(report.seconds for report in reports)
        masked: list[MaskedSum] = [one for _, one in found.values() if one.clients]
        shards = self._shards([slot for slot, (_, one) in found.items() if one.clients])
        for one in masked:
            done.messages.append(Message("server", "masked update", len(one.clients), one.nbytes))
            server.add(one)
        survivors = server.survivors()
        try:
            asked.refuse(survivors.clients, done.reports)
        except ValueError as error:
            raise SecAggAbort("masked input", str(error)) from None

        agreements = []
        if session.parameters.active:
            done.note("client", "survivors", [survivors] * len(survivors.clients))
            agreements = self._flat(self._trip("agree", dict.fromkeys(found, survivors)))
            done.note("server", "signature", agreements)
        requests = server.requests(agreements)
        try:
            asked.admit(survivors.clients)
        except ValueError as error:
            raise SecAggAbort("unmask", str(error)) from None
        done.note("client", "survivors", requests.values())
        wanted = {slot: {c: requests[c] for c in members[slot] if c in requests} for slot in found}
        wanted = {slot: mine for slot, mine in wanted.items() if mine}
        answers = self._flat(self._trip("unmask", wanted, void=False))
        done.note("server", "share", answers)
        removals = server.unmask(answers)
        total_L = server.total()
        done.messages.append(Message("server", "sum", 1, session.sums.nbytes))
        return self.slots.unmasked(session, total_L, removals, shards)

    def _shards(self, slots: Iterable[int]) -> list[Any]:
        """What of the masked vectors is not in the messages: the ranks' shards of each slot that is a gang."""
        found, lost = [], False
        for slot in slots:
            try:
                found.append(self.slots.masked_shards(slot))
            except LOST as error:
                self.slots.replace(slot, error)
                lost = True
        if lost:
            raise _SlotLost
        return found

    def _trip(self, name: str, given: Mapping[int, Any], *rest: Any, void: bool = True) -> dict[int, Any]:
        """What each slot answers to what it is given; of one that dies nothing, or _SlotLost once all have answered."""
        asked = {slot: self._call(slot, name, mine, *rest) for slot, mine in given.items()}
        found, lost = {}, False
        for slot, reference in asked.items():
            try:
                found[slot] = self._answer(reference)
            except LOST as error:
                self.slots.replace(slot, error)
                lost = True
            except RayTaskError as error:
                if isinstance(error.cause, SecAggAbort):
                    raise error.cause from error
                raise
        if lost and void and self.on_slot_death == "void":
            raise _SlotLost
        return found

    def _shared(self, value: Any) -> Any:
        """What slots are given in place of `value`, of which there is then one copy."""
        return ray.put(value)

    def _call(self, slot: int, name: str, *arguments: Any) -> Any:
        """Begins a trip of one slot."""
        return getattr(self.slots.actors[slot], name).remote(*arguments)

    def _answer(self, reference: Any) -> Any:
        """What the slot says."""
        return within(self.slots.timeout_s, reference)

    @staticmethod
    def _flat(found: Mapping[int, list[Any]]) -> list[Any]:
        return [one for answers in found.values() for one in answers]


def placement(units: list[Unit], costs: list[float], slots: Sequence[int]) -> Placed:
    """Each slot's packs: the longest work first, to the slot with the least; slots without any are left out."""
    loads, placed = np.zeros(len(slots)), dict[int, list[Unit]]()
    for place in np.argsort(-np.array(costs), kind="stable"):
        least = int(np.argmin(loads))
        loads[least] += costs[place]
        placed.setdefault(slots[least], []).append(units[place])
    return {slot: tuple(packs) for slot, packs in placed.items()}
