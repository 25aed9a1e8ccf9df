"""Trains a worker's clients one after another: makes a job, trains it, hands its update to an accumulator.

The same in a single process and in each rank of a group, where vectors are shards. Legend: P parameters.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from datasets_partition.store.tokens import Tokens
from engine.aggregation.accumulators import Accumulator
from engine.aggregation.exact_sum import LIMIT, NonFiniteUpdate, finite_bound
from engine.config.federation import Federation
from engine.config.sections import Lora
from engine.messages.broadcast import BroadcastMessage
from engine.messages.reports import DOWN, FLOAT_BYTES, UP, Report
from engine.messages.tasks import Unit
from engine.records.client_state import ClientStates
from engine.training.batching import steps_of
from engine.training.local_training import Job, Trainer
from engine.workers.peers import ALONE, Peers
from engine.workers.retries import Attempted, attempted
from strategies.core.layout import Layout
from strategies.core.protocol import Broadcast, ClientState, Update, Vector
from strategies.privacy.central import CentralPlan
from strategies.transforms.chain import bits, encode


@dataclass(frozen=True)
class Trained:
    """What training made of a client: its job, its update, and its state after the round."""

    job: Job
    update: Update
    after: ClientState


@dataclass
class ClientRunner:
    """A worker's clients. `trainer_of` gives the trainer of a unit; `layout` is of whole vectors, or of a rank's shard.

    There are no retries in a gang: an exception in one rank ends it.
    """

    federation: Federation
    tokens: Tokens
    states: ClientStates
    trainer_of: Callable[[Unit, BroadcastMessage], Trainer]
    layout: Layout
    peers: Peers = ALONE

    @cached_property
    def rows(self) -> np.ndarray:
        """The number of training rows of each client (N,)."""
        return self.tokens.counts("train")

    def run(self, chunk: Sequence[Unit], message: BroadcastMessage, accumulator: Accumulator) -> list[Report]:
        """Trains units one after another; `accumulator` takes each update that counts."""
        broadcast = self.receive(message)
        units = self.tokens.in_advance(chunk)
        return [report for unit in units for report in self._unit(unit, message, broadcast, accumulator)]

    def receive(self, message: BroadcastMessage) -> Broadcast:
        """Returns what all clients here receive."""
        federation, rank = self.federation, self.peers.rank
        broadcast = message.received(federation.strategy, self.layout, federation.seed, rank)
        return replace(broadcast, whole_norm=self.peers.whole_norm) if rank is not None else broadcast

    def received_by(self, client: int, broadcast: Broadcast) -> Broadcast:
        """Returns what one client receives: it knows its own LoRA rank, where ranks are mixed."""
        peft = self.federation.model.peft
        rank = peft.rank_of(client, self.federation.seed) if isinstance(peft, Lora) else None
        return replace(broadcast, rank=rank)

    def state_of(self, client: int, round_: int) -> ClientState:
        """Returns what the client keeps from the rounds before."""
        return self.states.read(client, round_) if self.federation.keeps_state else {}

    def _unit(
        self, unit: Unit, message: BroadcastMessage, broadcast: Broadcast, accumulator: Accumulator
    ) -> list[Report]:
        late = {client: report for client in unit if (report := self._late(client, broadcast))}
        present = tuple(client for client in unit if client not in late)
        trained = iter(self._trained(present, message, broadcast, accumulator) if present else [])
        return [late[client] if client in late else next(trained) for client in unit]

    def _late(self, client: int, broadcast: Broadcast) -> Report | None:
        """Reports a client that is too slow by the seed: it gets the broadcast, and need not train in vain."""
        steps = steps_of(int(self.rows[client]), self.federation.train)
        late = self.federation.clients.availability.late_by_seed(client, steps, self.federation.seed)
        if not late:
            return None
        return Report(client, {DOWN: self._traffic(self.received_by(client, broadcast))[DOWN], UP: 0.0}, late=late)

    def _trained(
        self, unit: Unit, message: BroadcastMessage, broadcast: Broadcast, accumulator: Accumulator
    ) -> list[Report]:
        began = time.monotonic()

        def train(clients: Unit) -> list[Trained]:
            jobs = [self._job(client, message, broadcast) for client in clients]
            # Updates may be lent from the trainer's memory if nothing else is trained before they are handed over.
            results = self.trainer_of(clients, message).updates(jobs, self.federation, lent=len(unit) == 1)
            return [Trained(job, *result) for job, result in zip(jobs, results, strict=True)]

        attempts = self._attempted(unit, train)
        trained_s, reports = (time.monotonic() - began) / len(unit), list[Report]()
        for attempt in attempts:
            if attempt.result is None:
                reports.append(Report.of_nothing(attempt.client, attempt.why))
            elif isinstance(attempt.result, NonFiniteUpdate):
                traffic = self._traffic(self.received_by(attempt.client, broadcast))
                reports.append(Report(attempt.client, traffic, failed=str(attempt.result)))
            else:
                report = self._hand_over(attempt.result, message, accumulator, trained_s)
                reports.append(replace(report, tried=attempt.why) if attempt.why else report)
        seconds = (time.monotonic() - began) / len(unit)  # adding up large updates takes its time too
        return [replace(report, seconds=seconds) for report in reports]

    def _attempted(
        self, unit: Unit, train: Callable[[Unit], list[Trained]]
    ) -> Iterable[Attempted[Trained] | Attempted[NonFiniteUpdate]]:
        if self.peers.rank is None:
            return attempted(unit, train, self.federation.clients.retries)
        (client,) = unit
        try:
            (trained,) = train(unit)
            return [Attempted(client, trained)]
        except NonFiniteUpdate as error:  # on all ranks
            return [Attempted(client, error)]

    def _job(self, client: int, message: BroadcastMessage, broadcast: Broadcast) -> Job:
        rows = self.tokens.rows(client, "train")
        weight = self.federation.privacy.weight(rows.num_rows, message.full_rows)
        received = self.received_by(client, broadcast)
        return Job(client, rows, weight, received, self.state_of(client, broadcast.round))

    def _hand_over(
        self, trained: Trained, message: BroadcastMessage, accumulator: Accumulator, trained_s: float
    ) -> Report:
        """Encodes a client's update and lets the accumulator take it; then its state is written."""
        federation, job = self.federation, trained.job
        update, kept = encode(federation.transforms, trained.update, job.broadcast, job.state)
        traffic = self._traffic(job.broadcast)
        update = replace(update, metrics=update.metrics | traffic)
        after = trained.after | kept
        if late := federation.clients.availability.late_by_clock(trained_s):
            return Report(job.client, traffic, late=late)
        try:
            self._refuse_useless(update, after)
            if isinstance(message.dp, CentralPlan):
                finite_bound(update)
                update = message.dp.encode(update, message.clip, job.broadcast.whole_norm)
            accumulator.add(update)
        except NonFiniteUpdate as error:
            return Report(job.client, traffic, failed=str(error))
        if federation.keeps_state:
            self.states.write(job.client, message.round + 1, after, message.oldest)
        return Report(job.client, update.metrics)

    def _traffic(self, broadcast: Broadcast) -> dict[str, float]:
        """Returns the bytes that a client receives and sends, over all ranks."""
        down, up = self.federation.strategy.floats(broadcast)
        # Transforms shorten the update alone, and not what the rule sends beside it.
        beside = max(0, up - broadcast.params.numel())
        sent = bits(self.federation.transforms, up - beside) / 8 + beside * FLOAT_BYTES
        return {DOWN: self.peers.summed(down * FLOAT_BYTES), UP: self.peers.summed(sent)}

    def _refuse_useless(self, update: Update, after: Mapping[str, Vector]) -> None:
        """NonFiniteUpdate, on all ranks if one has cause, for an update or a state that nothing can use.

        In a group of one the accumulator looks at the update itself.
        """
        finite = all(tensor.isfinite().all() for tensor in after.values())
        if self.peers.rank is None:
            if not finite:
                raise NonFiniteUpdate("its new client state holds NaN or infinity")
            return
        try:
            bound = finite_bound(update) if finite else float("nan")
        except NonFiniteUpdate:
            bound = float("nan")
        largest = self.peers.largest(bound)
        if not np.isfinite(largest):
            raise NonFiniteUpdate("its update, or its new client state, holds NaN or infinity")
        if largest >= LIMIT:
            raise NonFiniteUpdate(f"its update reaches beyond the exact sum's range of {LIMIT:.3g}")
