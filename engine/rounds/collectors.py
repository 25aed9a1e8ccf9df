"""Collects what the server gets of a round's local work, here in the clear; secure_round.py collects secured sums."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datasets_partition.store.store import Store
from engine.config.availability import Leaving, Trace, too_late
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage, share
from engine.messages.reports import DOWN, FLOAT_BYTES, UP, Report
from engine.messages.tasks import Work
from engine.objectives.base import Objective
from engine.objectives.figures import client_figures, figure_bounds, figure_metrics
from engine.rounds.server import Server
from strategies.privacy.checks import NoisePlan


@dataclass(frozen=True)
class Message:
    """`count` messages of a kind that reached a party, of `nbytes` together."""

    party: str
    kind: str
    count: int
    nbytes: int


@dataclass
class Collected:
    """What the server gets of a round: reports by client, the sums (none: nobody took part, or aborted), metrics.

    `metrics` are the cohort's: the mean `loss`, NaN if nothing was trained, the `tokens`, and the means of the
    objective's terms if it has several. `clipped` is the share of the coordinates that the bounds of secure aggregation
    have cut (None without it). With `by_client` the reports hold each client's own metrics. `gone` says why clients
    came too late or not at all, `aborted` why there are no sums, `too_few` the same if too few clients gave an update.
    `busy` are the workers' seconds of work.
    """

    reports: list[Report] = field(default_factory=list)
    sums: list[Any] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=lambda: {"loss": math.nan, "tokens": 0.0})
    messages: list[Message] = field(default_factory=list)
    gone: dict[int, str] = field(default_factory=dict)
    by_client: bool = True
    aborted: str | None = None
    sessions: int = 0
    store_bytes: int = 0
    busy: list[float] = field(default_factory=list)
    too_few: str | None = None
    clipped: float | None = None

    def note(self, party: str, kind: str, sent: Iterable[Any]) -> None:
        """Counts messages, which have `nbytes`."""
        sizes = [message.nbytes for message in sent]
        if sizes:
            self.messages.append(Message(party, kind, len(sizes), sum(sizes)))

    @property
    def good(self) -> list[Report]:
        """The reports of clients whose updates count."""
        return [report for report in self.reports if report.good]


@dataclass(frozen=True)
class ClearCollector:
    """Clients send their updates in the clear, and workers add them up where the rule reads sums."""

    federation: Federation
    server: Server
    trace: Trace | None = None

    def collect(self, work: Work, message: BroadcastMessage) -> Collected:
        """Dispatches the work of a round, which starts from `message`, and collects its sums."""
        federation = self.federation
        gone = federation.clients.availability.gone(work.clients, federation.seed, message.round, self.trace)
        there = work.of(~np.isin(work.clients, list(gone))) if gone else work
        worked = self.server.pool.train(there, share(message), message.lanes)
        reports, good = worked.reports, [report for report in worked.reports if report.good]
        sums, read = self.server.sums(worked) if good else ([], 0)
        messages, nbytes = _messages(reports, good), message.nbytes + read + worked.nbytes
        metrics, why = _metrics(good, federation.train.objective), reasons(gone, reports)
        return Collected(reports, sums, metrics, messages, why, store_bytes=nbytes, busy=worked.busy)

    def client_clip(self, plan: NoisePlan | None, clip: float, clients: int, round_: int) -> float:
        """Returns the norm to which clients clip where the server counts on `clip`: nothing is rounded on the way."""
        return clip


def shortfall(federation: Federation, store: Store, reports: Sequence[Report], cohort: int, round_: int) -> str | None:
    """Returns why a round has too few updates for clients.max_failed or clients.min_share; None if it has enough."""
    clients = federation.clients
    failed = [report for report in reports if report.failed is not None]
    if len(failed) > clients.max_failed * len(reports) or (failed and len(failed) == len(reports)):
        names = store.names([report.client for report in failed])
        return (
            f"{len(failed)} of {len(reports)} clients of round {round_} gave no usable update, more than "
            f"clients.max_failed = {clients.max_failed:g} allows: {first_names(names)}: {failed[0].why}; "
            f"lower train.optimizer.lr or raise clients.max_failed"
        )
    good = sum(report.good for report in reports)
    if good < clients.min_share * cohort:
        return (
            f"{good} of {cohort} clients of round {round_} gave an update, fewer than clients.min_share = "
            f"{clients.min_share:g} asks for: allow more time or lower clients.min_share"
        )
    return None


def first_names(names: list[str]) -> str:
    """Returns the first five names."""
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def reasons(gone: Mapping[int, Leaving], reports: Iterable[Report]) -> dict[int, str]:
    """Returns why clients came too late or not at all."""
    late = {report.client: too_late(report.late) for report in reports if report.late}
    return {client: leaving.why for client, leaving in gone.items()} | late


def _metrics(good: list[Report], objective: Objective) -> dict[str, float]:
    """The cohort's metrics, from the sums of all clients' figures."""
    clients = [client_figures(objective, report.metrics) for report in good]
    sums = {name: sum((client[name] for client in clients), 0.0) for name in figure_bounds(objective, 0)}
    return figure_metrics(objective, sums)


def _messages(reports: list[Report], good: list[Report]) -> list[Message]:
    """What the simulated protocol would have sent."""
    arrived = [report for report in reports if not report.late]
    down = round(sum(report.metrics[DOWN] for report in reports))
    up = round(sum(report.metrics[UP] for report in arrived))
    metrics = sum(not name.startswith("protocol_") for report in good for name in report.metrics)
    return [
        Message("client", "sum", len(reports) if down else 0, down),
        Message("server", "update", len(arrived) if up else 0, up),
        Message("server", "metric", metrics, metrics * FLOAT_BYTES),
    ]
