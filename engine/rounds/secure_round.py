"""One secured round in the driver: relays messages between workers, adds masked vectors, and unmasks their sum.

It never holds an unmasked update: secrets and vectors stay in the workers (see secure_clients.py). Every message that
it relays is counted for the ledger, by whom it reaches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import RayTaskError

from engine.aggregation.secure_clients import Opening
from engine.messages.broadcast import BroadcastMessage, share
from engine.messages.reports import Report
from engine.messages.tasks import Unit, Work
from engine.records.journal import SumRefused
from engine.rounds.server import MaskedTotal, Shards
from engine.scheduling.pool import Pool
from engine.system.failures import LOST, within
from strategies.secagg.messages import KeyList, MaskedSum
from strategies.secagg.protocol import Phase, SecAggAbort, Session
from strategies.secagg.server import Server

Gone = Mapping[int, Phase]  # who drops out, and before which answer
Placed = dict[int, tuple[Unit, ...]]  # the units of work of each slot
Answers = dict[int, Any]  # by slot


class _SlotLost(Exception):
    """A slot died with its clients' secrets: the session is void."""


@dataclass(frozen=True)
class _Request:
    """What the sessions of a round have in common; `known` are the public identities in the active profile."""

    placed: Placed
    broadcast: Any
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
    """The result of a secured round: reports, a sum or why there is none, and all messages, of void sessions too.

    `lost` are clients whose slot died before it gave their masked sum, if that counts as dropping out.
    """

    reports: list[Report] = field(default_factory=list)
    lost: tuple[int, ...] = ()
    total: MaskedTotal | None = None
    aborted: str | None = None
    sessions: int = 0
    busy: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def note(self, party: str, kind: str, sent: Iterable[Any]) -> None:
        """Counts messages, which have `nbytes`."""
        sizes = [message.nbytes for message in sent]
        if sizes:
            self.messages.append(Message(party, kind, len(sizes), sum(sizes)))


@dataclass(frozen=True)
class Relay:
    """Plays secured rounds on the pool of `shards`. `authority` vouches for identities in the active profile."""

    shards: Shards
    authority: Any
    on_slot_death: str

    @property
    def pool(self) -> Pool:
        """The slots that play the clients."""
        return self.shards.pool

    def play(
        self,
        session: Session,
        work: Work,
        broadcast: BroadcastMessage,
        gone: Gone,
        refuse: Callable[[Sequence[int], Sequence[Report]], None],
        admit: Callable[[Sequence[int]], None],
    ) -> Relayed:
        """Plays one round of secured `work` from `broadcast`.

        `refuse` sees the survivors and the reports, of each session of the round; `admit` is called once, just before
        clients are asked for the shares that unmask the survivors' sum. If one of them raises SumRefused the round has
        no result.

        A slot that dies before the sum is being unmasked voids the session, and the next one has new keys; RunError
        if too many die. Once clients have been asked for shares, nothing is void: a second sum beside the first
        could tell the difference between them.
        """
        relayed = Relayed()
        units, shared = self.pool.units(work, broadcast.lanes), share(broadcast)
        known = None
        if session.parameters.active:
            cohort = tuple(work.clients.tolist())
            known = self.pool.ask(lambda actor: actor.roster.remote(cohort, self.authority))
        self.pool.deaths = 0
        while True:
            relayed.sessions += 1
            placed = placement(units, [work.cost(unit) for unit in units], self.pool.alive)
            try:
                relayed.total = self._session(session, _Request(placed, shared, gone, refuse, admit, known), relayed)
                return relayed
            except _SlotLost:
                session = replace(session, attempt=session.attempt + 1)
            except SecAggAbort as abort:
                relayed.aborted = str(abort)
                return relayed

    def _session(self, session: Session, request: _Request, relayed: Relayed) -> MaskedTotal:
        members = {slot: [client for unit in units for client in unit] for slot, units in request.placed.items()}
        cohort = tuple(sorted(client for clients in members.values() for client in clients))
        server = Server(session, cohort, self.shards.held(session.sums), request.known)

        openings = {slot: Opening(session, cohort, units, request.gone) for slot, units in request.placed.items()}
        opened = self._trip("open", openings, self.authority)
        keys = _flat(opened)
        relayed.note("server", "key", keys)
        key_list: KeyList = server.key_list(keys)
        relayed.note("client", "key", [key_list] * len(keys))

        shared = self._trip("shares", dict.fromkeys(opened, share(key_list)))
        shares = _flat(shared)
        relayed.note("server", "sealed share", shares)
        inboxes = server.inboxes(shares)
        boxes = sum(len(inbox.boxes) for inbox in inboxes.values())
        relayed.messages.append(Message("other clients", "share", boxes, sum(i.nbytes for i in inboxes.values())))

        of_slots = {slot: {c: inboxes[c] for c in members[slot] if c in inboxes} for slot in shared}
        trained = self._trip("masked", {slot: inbox for slot, inbox in of_slots.items() if inbox}, request.broadcast)
        self._note_reports(relayed, trained, members, request.gone)
        masked: dict[int, MaskedSum] = {slot: answer for slot, (_, answer) in trained.items() if answer.clients}
        shards = self._shards(masked)
        for message in masked.values():
            relayed.messages.append(Message("server", "masked update", len(message.clients), message.nbytes))
            server.add(message)
        survivors = server.survivors()
        try:
            request.refuse(survivors.clients, relayed.reports)
        except SumRefused as error:
            raise SecAggAbort("masked input", str(error)) from None

        agreements = []
        if session.parameters.active:
            relayed.note("client", "survivors", [survivors] * len(survivors.clients))
            agreements = _flat(self._trip("agree", dict.fromkeys(trained, survivors)))
            relayed.note("server", "signature", agreements)
        requests = server.requests(agreements)
        try:
            request.admit(survivors.clients)
        except SumRefused as error:
            raise SecAggAbort("unmask", str(error)) from None
        relayed.note("client", "survivors", requests.values())
        wanted = {slot: {c: requests[c] for c in members[slot] if c in requests} for slot in trained}
        wanted = {slot: clients for slot, clients in wanted.items() if clients}
        answers = _flat(self._trip("unmask", wanted, void=False))
        relayed.note("server", "share", answers)
        removals = server.unmask(answers)
        relayed.messages.append(Message("server", "sum", 1, session.sums.nbytes))
        return MaskedTotal(session, server.total(), removals, shards)

    def _note_reports(
        self, relayed: Relayed, trained: Answers, members: Mapping[int, Sequence[int]], gone: Gone
    ) -> None:
        """Notes the reports of the slots that have answered, their seconds of work, and whose slots have not."""
        reports = (report for of_slot, _ in trained.values() for report in of_slot)
        relayed.reports = sorted(reports, key=lambda report: report.client)
        silent = [client for slot, clients in members.items() if slot not in trained for client in clients]
        relayed.lost = tuple(client for client in silent if client not in gone)
        relayed.busy = [0.0] * self.pool.size
        for slot, (of_slot, _) in trained.items():
            relayed.busy[slot] = sum(report.seconds for report in of_slot)

    def _shards(self, slots: Iterable[int]) -> list[Any]:
        """The shards of each slot's masked vector that its ranks hold beside the message; nothing of a plain slot."""
        return [*self._answers({slot: partial(self.shards.masked_shards, slot) for slot in slots}, void=True).values()]

    def _trip(self, name: str, given: Mapping[int, Any], *rest: Any, void: bool = True) -> Answers:
        """Returns each slot's answer to what it is given; whether a death is `void`, the recipe says."""
        calls = {slot: self._call(slot, name, argument, *rest) for slot, argument in given.items()}
        waits = {slot: partial(self._answer, reference) for slot, reference in calls.items()}
        return self._answers(waits, void=void and self.on_slot_death == "void")

    def _answers(self, waits: Mapping[int, Callable[[], Any]], *, void: bool) -> Answers:
        """Returns what each slot answers; one that dies is replaced, and gives nothing.

        With `void` a death raises _SlotLost, once all others have answered.
        """
        answers, lost = {}, False
        for slot, wait in waits.items():
            try:
                answers[slot] = wait()
            except LOST as error:
                self.pool.replace(slot, error)
                lost = True
            except RayTaskError as error:
                if isinstance(error.cause, SecAggAbort):
                    raise error.cause from error
                raise
        if lost and void:
            raise _SlotLost
        return answers

    def _call(self, slot: int, name: str, *arguments: Any) -> Any:
        """Begins a slot's part of a trip."""
        return getattr(self.pool.actors[slot], name).remote(*arguments)

    def _answer(self, reference: Any) -> Any:
        """Waits for a slot's answer."""
        return within(self.pool.timeout_s, reference)


def _flat(answers: Mapping[int, list[Any]]) -> list[Any]:
    """The messages of all slots."""
    return [message for of_slot in answers.values() for message in of_slot]


def placement(units: list[Unit], costs: list[float], slots: Sequence[int]) -> Placed:
    """Gives units to slots: the longest work first, to the slot with the least; slots without any are left out."""
    loads, placed = np.zeros(len(slots)), dict[int, list[Unit]]()
    for index in np.argsort(-np.array(costs), kind="stable"):
        least = int(np.argmin(loads))
        loads[least] += costs[index]
        placed.setdefault(slots[least], []).append(units[index])
    return {slot: tuple(of_slot) for slot, of_slot in placed.items()}
