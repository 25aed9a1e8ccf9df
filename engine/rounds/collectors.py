"""What of a round's local work reaches the server: plain updates and figures, or secured sums alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import ray
import torch

from engine.aggregation.ring_encoding import Plan, ring_aggregate, ring_sums
from engine.config.availability import DIED_WITH_SLOT, LEFT_OUT, Leaving, Trace, too_late
from engine.config.federation import Federation, Lora
from engine.config.privacy import SecAgg
from engine.messages.broadcast import BroadcastMessage
from engine.messages.events import Fault
from engine.messages.reports import DOWN, FLOAT_BYTES, UP, Report
from engine.messages.shards import ShardSum, ShardTotals
from engine.messages.tasks import Work
from engine.records.journal import Journal
from engine.rounds.secure_round import Message, Relay
from engine.scheduling.dispatcher import Worked
from engine.scheduling.pool import Pool
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate
from strategies.lora.hetlora import HetLora
from strategies.privacy.distributed import DistributedPlan
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums

WITHIN_CALLS = 65_536  # bytes, well below what Ray puts into the store by itself


@dataclass(frozen=True)
class Collected:
    """A round's work: reports by client, the aggregate (None: nobody took part, or it was aborted), and figures.

    `figures` are sums over the clients: `nll` in nats, `learnt` and `tokens`. `told`: reports hold each client's own.
    `gone` says why clients came too late or not at all. `too_few`: aborted since too few gave an update. `busy` are the
    slots' seconds of work.
    """

    reports: list[Report] = field(default_factory=list)
    aggregate: Any = None
    figures: dict[str, float] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    gone: dict[int, str] = field(default_factory=dict)
    told: bool = True
    aborted: str | None = None
    sessions: int = 0
    store_bytes: int = 0
    busy: list[float] = field(default_factory=list)
    too_few: str | None = None

    @property
    def loss(self) -> float:
        """The mean training loss in nats per token; NaN where there is none."""
        learnt = self.figures.get("learnt", 0.0)
        return self.figures["nll"] / learnt if learnt else math.nan


class Collector(Protocol):
    """How a cohort's work is had."""

    def collect(self, work: Work, wire: Any) -> Collected:
        """Lets a cohort train from `wire`."""
        ...


@dataclass(frozen=True)
class PlainCollector:
    """Clients send their updates, and the server may look at them: without secure aggregation."""

    federation: Federation
    slots: Pool
    trace: Trace | None = None

    def collect(self, work: Work, wire: BroadcastMessage) -> Collected:
        """The simulator adds up where the rule reads sums; the protocol's server would have had each update."""
        gone = self._gone(work, wire)
        done = self.slots.train(_without(work, gone), _shared(wire), wire.lanes)
        aggregate = None
        if any(report.good for report in done.reports):
            aggregate = done.sums[0] if self.federation.strategy.reads == "sum" else _listed(done.each)
        counted, good = aggregate.count if aggregate else 0, sum(report.good for report in done.reports)
        assert counted == good, f"{counted} updates in the sum, and {good} clients that gave one"
        moved = wire.nbytes + len(done.each) * wire.shards[0].params.nbytes
        return self._told(gone, done, aggregate, moved + done.nbytes)

    def _gone(self, work: Work, wire: BroadcastMessage) -> dict[int, Leaving]:
        """Those who drop out on purpose."""
        availability = self.federation.clients.availability
        return availability.gone(work.clients, self.federation.seed, wire.round, self.trace)

    def _told(self, gone: Mapping[int, Leaving], done: Worked, aggregate: Any, moved: int) -> Collected:
        reports = done.reports
        good = [report for report in reports if report.good]
        arrived = [report for report in reports if not report.late]
        figures = {
            "nll": sum(report.metrics["loss"] * report.metrics["learnt"] for report in good),
            "learnt": sum(report.metrics["learnt"] for report in good),
            "tokens": sum(report.metrics["tokens"] for report in good),
        }
        down, up = (round(sum(report.metrics[name] for report in of)) for name, of in ((DOWN, reports), (UP, arrived)))
        told = sum(not name.startswith("protocol_") for report in good for name in report.metrics)
        messages = [
            Message("client", "sum", len(reports) if down else 0, down),
            Message("server", "update", len(arrived) if up else 0, up),
            Message("server", "metric", told, told * FLOAT_BYTES),
        ]
        why = _why(gone, reports)
        return Collected(reports, aggregate, figures, messages, why, store_bytes=moved, busy=done.busy)


@dataclass(frozen=True)
class ShardCollector(PlainCollector):
    """Gangs' updates: the sums stay in the object store, in shards."""

    def collect(self, work: Work, wire: BroadcastMessage) -> Collected:
        """As in the clear; the aggregate is each gang's sum, in shards."""
        gone = self._gone(work, wire)
        done = self.slots.train(_without(work, gone), wire, wire.lanes)
        moved = wire.nbytes + done.nbytes
        return self._told(gone, done, done.sums if any(report.good for report in done.reports) else None, moved)


@dataclass(frozen=True)
class SecureCollector:
    """The server learns sums and nothing else: see relay.py. `most_tokens` bound what one client trains on.

    `journal` knows of the sums that the run has unmasked. `too_few` says why a round's reports, of so many clients,
    are too few to count: before their sum is known, since a round that does not count leaves the model as it was.
    """

    federation: Federation
    relay: Relay
    layout: Layout
    most_tokens: int
    journal: Journal
    too_few: Callable[[Sequence[Report], int, int], str | None]
    trace: Trace | None = None

    def collect(self, work: Work, wire: BroadcastMessage) -> Collected:
        """One secured round; aborted where the cohort, or what is left of it, is too small."""
        federation, secagg, cohort = self.federation, self.federation.privacy.secagg, work.clients
        assert secagg.mode != "off"
        if not len(cohort):
            return Collected(told=False)
        least = max(secagg.min_contributors, wire.dp.least if isinstance(wire.dp, DistributedPlan) else 0)

        round_ = wire.round + 1
        short: str | None = None

        def refuse(clients: Sequence[int], reports: Sequence[Report]) -> None:
            nonlocal short
            self._refuse_thin(secagg, clients, least)
            short = self.too_few(reports, len(cohort), round_)
            if short is not None:
                raise ValueError(short)

        def refuse_difference(clients: Sequence[int]) -> None:
            self._refuse_thin(secagg, clients, secagg.min_contributors)

        def admit(clients: Sequence[int]) -> None:
            try:
                self.journal.admit(round_, clients, refuse_difference)
            except ValueError as error:
                self.relay.slots.faults.append(Fault("round", str(round_), str(error)))
                raise

        try:
            self._refuse_thin(secagg, cohort.tolist(), least)
            parameters = secagg.parameters(len(cohort))
        except ValueError as error:
            return Collected(told=False, aborted=str(error))
        sums = self.sums(wire.dp, wire.clip, len(cohort), wire.round)
        gone = federation.clients.availability.gone(cohort, federation.seed, wire.round, self.trace)
        before = self.journal.clients(round_)
        if before is not None:
            others = [client for client in cohort.tolist() if client not in before]
            gone = {client: Leaving("masked input", LEFT_OUT) for client in others} | gone
        session = Session(wire.round, 0, parameters, sums, secagg.mode)
        leaving = {client: leaves.before for client, leaves in gone.items()}
        done = self.relay.play(session, work, wire, wire.lanes, leaving, refuse, admit)
        down = round(sum(report.metrics[DOWN] for report in done.reports))
        messages = [Message("client", "sum", len(done.reports) if down else 0, down), *done.messages]
        moved = FLOAT_BYTES * self.layout.size + done.sessions * self.relay.slots.size * FLOAT_BYTES * sums.length
        why = _why(gone, done.reports) | dict.fromkeys(done.lost, DIED_WITH_SLOT)
        found = Collected(done.reports, None, {}, messages, why, False, done.aborted, done.sessions, moved, done.busy)
        if done.totals is None:
            return replace(found, too_few=short)
        if done.totals.weight == 0:
            return replace(found, aborted="all weights are less than the ring's steps: raise privacy.secagg.bits")
        if isinstance(done.totals, ShardTotals):
            shards = [ShardSum(done.totals.parts, 0)]
            return Collected(**vars(found) | {"aggregate": shards, "figures": done.totals.figures})
        aggregate, figures = ring_aggregate(done.totals, federation, self.layout, wire.dp, wire.round)
        return Collected(**vars(found) | {"aggregate": aggregate, "figures": figures})

    def sums(self, plan: Plan, clip: float, clients: int, round_: int) -> Sums:
        """What a round's session of so many clients adds up; ValueError where the ring is too small."""
        return ring_sums(self.federation, self.layout, plan, clip, clients, self.most_tokens, round_)

    def _refuse_thin(self, secagg: SecAgg, clients: Sequence[int], least: int) -> None:
        """ValueError where a sum would be of so few that it tells of one of them, or has too little noise."""
        if len(clients) < least:
            raise ValueError(f"{len(clients)} clients are there, and it takes {least}")
        peft, rule = self.federation.model.peft, self.federation.strategy
        if not isinstance(peft, Lora) or not peft.ranks or not isinstance(rule, HetLora):
            return
        ranks = [peft.rank_of(int(client), self.federation.seed) or peft.r for client in clients]
        for rank in sorted(set(ranks)):
            given = sum(own >= rank for own in ranks)
            if given < secagg.min_contributors:
                raise ValueError(
                    f"{given} clients have rank {rank} or more, and privacy.secagg.min_contributors asks "
                    f"for {secagg.min_contributors} for each coordinate"
                )


def _without(work: Work, gone: Mapping[int, Leaving]) -> Work:
    return work.of(~np.isin(work.clients, list(gone))) if gone else work


def _why(gone: Mapping[int, Leaving], reports: Iterable[Report]) -> dict[int, str]:
    """Why clients came too late or not at all."""
    late = {report.client: too_late(report.late) for report in reports if report.late}
    return {client: leaves.why for client, leaves in gone.items()} | late


def _listed(each: dict[int, Any]) -> Aggregate:
    """The single updates in the order of clients, mapped from the object store; nobody has added them up."""
    found = {client: ray.get(each[client]) for client in sorted(each)}
    assert all(update is None or update.client == client for client, update in found.items())
    updates = tuple(update.update() for update in found.values() if update is not None)
    nothing = torch.zeros_like(updates[0].delta)
    return Aggregate(sum(update.weight for update in updates), nothing, {}, len(updates), updates)


def _shared(wire: BroadcastMessage) -> Any:
    """What calls are given: a reference, or, of few bytes, all of it, since to look into the store takes longer."""
    return wire if wire.nbytes <= WITHIN_CALLS else ray.put(wire)
