"""A secured round in the driver: which sums the server may learn, and how slots and server come to them.

The driver never holds an unmasked update: secrets and vectors stay in the workers (see secure_clients.py). It relays
messages between them, adds masked vectors up, and counts every message for the ledger by whom it reaches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.aggregation.ring_encoding import ring_sums, rounding, sent_lengths_of
from engine.aggregation.secure_clients import Authority, Opening
from engine.config.availability import DIED_WITH_SLOT, LEFT_OUT, Leaving, Trace
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage, share
from engine.messages.errors import RunError
from engine.messages.events import Fault
from engine.messages.reports import DOWN, FLOAT_BYTES, Report
from engine.messages.tasks import Unit, Work
from engine.objectives.figures import figure_metrics
from engine.records.journal import Journal, SumRefused
from engine.rounds.collectors import Collected, Message, reasons
from engine.rounds.server import MaskedTotal, Server
from engine.system.failures import LOST, within
from strategies.core.errors import StrategyError
from strategies.privacy.checks import NoisePlan
from strategies.secagg.messages import MaskedSum
from strategies.secagg.protocol import Phase, SecAggAbort, Session
from strategies.secagg.ring import Sums
from strategies.secagg.server import SecAggServer

MOST_CLIPPED = 0.01  # a share of coordinates: more is warned about
Shortfall = Callable[[Sequence[Report], int, int], str | None]
Gone = Mapping[int, Phase]  # who drops out, and before which answer
Placed = dict[int, tuple[Unit, ...]]  # the units of work of each slot
Members = dict[int, list[int]]  # the clients of each slot
Answers = dict[int, Any]  # by slot
Known = dict[int, bytes] | None  # the public identities in the active profile


class _SlotLost(Exception):
    """A slot died with its clients' secrets: the session is void."""


@dataclass(frozen=True)
class Relay:
    """Takes messages to slots and back. `authority` vouches for identities in the active profile."""

    server: Server
    authority: Any
    on_slot_death: str

    def trip(self, name: str, given: Mapping[int, Any], *rest: Any, void: bool = True) -> Answers:
        """Returns each slot's answer to what it is given; whether a death is `void`, the recipe says."""
        calls = {slot: self._call(slot, name, argument, *rest) for slot, argument in given.items()}
        waits = {slot: partial(self._answer, reference) for slot, reference in calls.items()}
        return self.answers(waits, void=void and self.on_slot_death == "void")

    def answers(self, waits: Mapping[int, Callable[[], Any]], *, void: bool) -> Answers:
        """Returns what slots answer; replaces those that die, and then with `void` raises _SlotLost."""
        answers = {}
        for slot, wait in waits.items():
            try:
                answers[slot] = wait()
            except LOST as error:
                self.server.pool.replace(slot, error)
            except RayTaskError as error:
                if isinstance(error.cause, SecAggAbort):
                    raise error.cause from error
                raise
        if void and len(answers) < len(waits):
            raise _SlotLost
        return answers

    def _call(self, slot: int, name: str, *arguments: Any) -> Any:
        return getattr(self.server.pool.actors[slot], name).remote(*arguments)

    def _answer(self, reference: Any) -> Any:
        return within(self.server.pool.timeout_s, reference)


def _flat(answers: Mapping[int, list[Any]]) -> list[Any]:
    return [message for of_slot in answers.values() for message in of_slot]


def _by_slot(messages: Mapping[int, Any], members: Members, slots: Iterable[int]) -> dict[int, dict[int, Any]]:
    """Sorts messages to clients by the clients' slots, without slots that get none."""
    by_slot = {slot: {c: messages[c] for c in members[slot] if c in messages} for slot in slots}
    return {slot: of_slot for slot, of_slot in by_slot.items() if of_slot}


def placement(units: list[Unit], costs: list[float], slots: Sequence[int]) -> Placed:
    """Gives units to slots: the longest work first, to the slot with the least; slots without any are left out."""
    loads, placed = np.zeros(len(slots)), dict[int, list[Unit]]()
    for index in np.argsort(-np.array(costs), kind="stable"):
        least = int(np.argmin(loads))
        loads[least] += costs[index]
        placed.setdefault(slots[least], []).append(units[index])
    return {slot: tuple(of_slot) for slot, of_slot in placed.items()}


@dataclass(frozen=True)
class SecureCollector:
    """The server learns sums and nothing else. `most_tokens` bound what one client trains on in a round.

    `journal` knows the sums that the run has unmasked. `shortfall` judges a round's reports before their sum is known,
    since a round that does not count leaves the model as it was.
    """

    federation: Federation
    relay: Relay
    most_tokens: int
    journal: Journal
    shortfall: Shortfall
    trace: Trace | None = None

    def collect(self, work: Work, message: BroadcastMessage) -> Collected:
        """Plays one secured round; it is aborted if the cohort, or what is left of it, is too small."""
        secagg, cohort, collected = self.federation.privacy.secagg, work.clients, Collected(by_client=False)
        assert secagg.mode != "off"
        if not len(cohort):
            return collected
        plan = message.noise_plan
        least = max(secagg.min_contributors, plan.least if plan is not None and plan.adds_to == "ring" else 0)
        try:
            self._refuse_thin(cohort.tolist(), least)
            parameters = secagg.parameters(len(cohort))
        except (SumRefused, StrategyError) as error:
            collected.aborted = str(error)
            return collected
        sums, gone = self.sums(plan, message.clip, len(cohort), message.round), self._gone(work, message.round)
        session = Session(message.round, 0, parameters, sums, secagg.mode)
        leaving = {client: leaves.before for client, leaves in gone.items()}
        if (total := self._play(session, work, message, leaving, least, collected)) is not None:
            count, weight, unmasked, figures = self.relay.server.unmasked(total, plan)
            if weight == 0:
                collected.aborted = "all weights are less than the ring's steps: raise privacy.secagg.bits"
            else:
                collected.sums = unmasked
                collected.metrics = figure_metrics(self.federation.train.objective, figures)
                collected.clipped = self._clipped(figures, count, message.round)
        down, pool = round(sum(report.metrics[DOWN] for report in collected.reports)), self.relay.server.pool
        collected.messages.insert(0, Message("client", "sum", len(collected.reports) if down else 0, down))
        collected.gone = reasons(gone, collected.reports) | collected.gone
        collected.store_bytes = FLOAT_BYTES * (pool.layout.size + collected.sessions * pool.size * sums.length)
        return collected

    def _play(
        self, session: Session, work: Work, message: BroadcastMessage, gone: Gone, least: int, collected: Collected
    ) -> MaskedTotal | None:
        """Plays sessions until one ends; returns the sum, None if it is aborted.

        A slot that dies before the sum is being unmasked voids the session, and the next one has new keys; RunError
        if too many die. Once clients have been asked for shares, nothing is void: a second sum beside the first
        could tell the difference between them.
        """
        pool, shared, known = self.relay.server.pool, share(message), None
        units = pool.units(work, message.lanes)
        if session.parameters.active:
            known = pool.ask(lambda actor: actor.roster.remote(tuple(work.clients.tolist()), self.relay.authority))
        pool.deaths = 0
        while True:
            collected.sessions += 1
            placed = placement(units, [work.cost(unit) for unit in units], pool.alive)
            try:
                return self._session(session, placed, known, shared, gone, least, collected)
            except _SlotLost:
                session = replace(session, attempt=session.attempt + 1)
            except SecAggAbort as abort:
                collected.aborted = str(abort)
                return None

    def _session(
        self, session: Session, placed: Placed, known: Known, shared: Any, gone: Gone, least: int, collected: Collected
    ) -> MaskedTotal:
        """Plays one session."""
        relay = self.relay
        members = {slot: [client for unit in units for client in unit] for slot, units in placed.items()}
        cohort = tuple(sorted(client for clients in members.values() for client in clients))
        secagg_server = SecAggServer(session, cohort, relay.server.held(session.sums), known)

        openings = {slot: Opening(session, cohort, units, gone) for slot, units in placed.items()}
        opened = relay.trip("open", openings, relay.authority)
        keys = _flat(opened)
        collected.note("server", "key", keys)
        key_list = secagg_server.key_list(keys)
        collected.note("client", "key", [key_list] * len(keys))

        sealed = relay.trip("shares", dict.fromkeys(opened, share(key_list)))
        shares = _flat(sealed)
        collected.note("server", "sealed share", shares)
        inboxes = secagg_server.inboxes(shares)
        boxes = sum(len(inbox.boxes) for inbox in inboxes.values())
        collected.messages.append(Message("other clients", "share", boxes, sum(i.nbytes for i in inboxes.values())))

        trained = relay.trip("masked", _by_slot(inboxes, members, sealed), shared)
        self._note_reports(collected, trained, members, gone)
        masked: dict[int, MaskedSum] = {slot: answer for slot, (_, answer) in trained.items() if answer.clients}
        # What ranks of a gang hold beside their message; a slot that has lost it has lost its clients.
        waits = {slot: partial(relay.server.masked_shards, slot) for slot in masked}
        shards = [*relay.answers(waits, void=True).values()]
        for message in masked.values():
            collected.messages.append(Message("server", "masked update", len(message.clients), message.nbytes))
            secagg_server.add(message)
        survivors = secagg_server.survivors()
        self._refuse(survivors.clients, least, len(cohort), session.round + 1, collected)
        agreements = []
        if session.parameters.active:
            collected.note("client", "survivors", [survivors] * len(survivors.clients))
            agreements = _flat(relay.trip("agree", dict.fromkeys(trained, survivors)))
            collected.note("server", "signature", agreements)
        requests = secagg_server.requests(agreements)
        self._admit(survivors.clients, session.round + 1)
        collected.note("client", "survivors", requests.values())
        answers = _flat(relay.trip("unmask", _by_slot(requests, members, trained), void=False))
        collected.note("server", "share", answers)
        removals = secagg_server.unmask(answers)
        collected.messages.append(Message("server", "sum", 1, session.sums.nbytes))
        return session, secagg_server.total(), removals, shards

    def _note_reports(self, collected: Collected, trained: Answers, members: Members, gone: Gone) -> None:
        """Notes the reports of the slots that have answered, their seconds of work, and whose slots have not."""
        reports = (report for of_slot, _ in trained.values() for report in of_slot)
        collected.reports = sorted(reports, key=lambda report: report.client)
        silent = [client for slot, clients in members.items() if slot not in trained for client in clients]
        collected.gone = {client: DIED_WITH_SLOT for client in silent if client not in gone}
        collected.busy = [0.0] * self.relay.server.pool.size
        for slot, (of_slot, _) in trained.items():
            collected.busy[slot] = sum(report.seconds for report in of_slot)

    def _refuse(self, clients: Sequence[int], least: int, cohort: int, round_: int, collected: Collected) -> None:
        """Raises SecAggAbort if the survivors, or the clients that gave an update, are too few."""
        try:
            self._refuse_thin(clients, least)
            collected.too_few = self.shortfall(collected.reports, cohort, round_)
            if collected.too_few is not None:
                raise SumRefused(collected.too_few)
        except SumRefused as error:
            raise SecAggAbort("masked input", str(error)) from None

    def _admit(self, clients: Sequence[int], round_: int) -> None:
        """Writes down whose sum is about to be unmasked; SecAggAbort if it must not be."""
        contributors = self.federation.privacy.secagg.min_contributors
        try:
            self.journal.admit(round_, clients, lambda apart: self._refuse_thin(apart, contributors))
        except SumRefused as error:
            self.relay.server.pool.faults.append(Fault("round", str(round_), str(error)))
            raise SecAggAbort("unmask", str(error)) from None

    def client_clip(self, plan: NoisePlan | None, clip: float, clients: int, round_: int) -> float:
        """Returns the norm to which clients clip: less than the server counts on, by what a ring's rounding may add."""
        sums = self.sums(plan, clip, max(1, clients), round_)
        if plan is None or plan.adds_to != "sum":
            return clip
        room = clip - rounding(sums)
        if room < clip / 2:
            raise RunError(
                f"a ring of {sums.bits} bits rounds away more than half of privacy.dp.clip = {clip:g} with "
                f"{clients} clients: raise privacy.secagg.bits, or lower cohort.size"
            )
        return room

    def refuse_small_ring(self, plan: NoisePlan | None, clip: float, clients: int, round_: int) -> None:
        """Raises an error if a cohort of `clients` does not fit the graph or the ring of a round from `round_` on."""
        self.federation.privacy.secagg.parameters(max(2, clients))
        for later in range(round_, self.federation.rounds):
            self.client_clip(plan, clip, max(2, clients), later)

    def sums(self, plan: NoisePlan | None, clip: float, clients: int, round_: int) -> Sums:
        """Returns what a round's session with `clients` clients adds up; StrategyError if the ring is too small."""
        return ring_sums(self.federation, self.relay.server.pool.layout, plan, clip, clients, self.most_tokens, round_)

    def _clipped(self, figures: dict[str, float], clients: int, round_: int) -> float:
        """Returns the share of the clients' coordinates that bounds have cut, and warns of a large one."""
        pool = self.relay.server.pool
        lengths = sent_lengths_of(self.federation, pool.layout, round_)
        cut = max(0.0, figures["clipped"]) / (clients * max(1, sum(lengths.values())))
        if cut > MOST_CLIPPED:
            bounds = "privacy.secagg.bound" + (" or bounds" if len(lengths) > 1 else "")
            why = f"{cut:.1%} of the coordinates that clients sent are beyond what the ring takes, and were cut"
            pool.faults.append(Fault("round", str(round_ + 1), f"{why}: raise {bounds}"))
        return cut

    def _gone(self, work: Work, round_: int) -> dict[int, Leaving]:
        """Returns who drops out; if this round's sum was asked for before, so does everyone who was not in it."""
        federation, before = self.federation, self.journal.clients(round_ + 1)
        gone = federation.clients.availability.gone(work.clients, federation.seed, round_, self.trace)
        if before is None:
            return gone
        others = (client for client in work.clients.tolist() if client not in before)
        return dict.fromkeys(others, Leaving("masked input", LEFT_OUT)) | gone

    def _refuse_thin(self, clients: Sequence[int], least: int) -> None:
        """Raises SumRefused if a sum would be of so few that it tells of one of them, or has too little noise."""
        if len(clients) < least:
            raise SumRefused(f"{len(clients)} clients are there, and it takes {least}")
        peft, rule = self.federation.model.peft, self.federation.strategy
        if not peft.ranks or rule.sends_products:
            return
        lora_ranks = [peft.lora_rank_of(int(client), self.federation.seed) or 0 for client in clients]
        contributors = self.federation.privacy.secagg.min_contributors
        for lora_rank in sorted(set(lora_ranks)):
            count = sum(other >= lora_rank for other in lora_ranks)
            if count < contributors:
                raise SumRefused(
                    f"{count} clients have rank {lora_rank} or more, and privacy.secagg.min_contributors asks "
                    f"for {contributors} for each coordinate"
                )


def start_relay(server: Server, on_slot_death: str) -> Relay:
    """Returns a relay with an authority of its own, beside the driver: it survives the loss of any other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Relay(server, ray.remote(Authority).options(num_cpus=0, scheduling_strategy=here).remote(), on_slot_death)
