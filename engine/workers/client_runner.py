"""Trains a worker's clients: makes a job, trains it, hands its update to an accumulator. Legend: P parameters."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from datasets_partition.store.store import SplitName
from datasets_partition.store.tokens import Tokens
from engine.aggregation.accumulators import Accumulator
from engine.aggregation.exact_sum import LIMIT, NonFiniteUpdate, finite_bound
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.errors import AccessDenied, BaseRemoved
from engine.messages.exposure import Exposure
from engine.messages.reports import DOWN, FLOAT_BYTES, UP, Report
from engine.messages.tasks import Unit, halves
from engine.records.client_state import ClientStates
from engine.system.failures import cause_of, last_line
from engine.training.local_training import ClientTrainer, Job
from engine.training.step_loop import steps_of
from strategies.core.layout import Layout
from strategies.core.protocol import Broadcast, ClientState, Update, Vector
from strategies.core.sharding import Partition
from strategies.transforms.chain import bits, encode


@dataclass(frozen=True)
class Attempted:
    """A client's result (None: it could not be trained), and why each earlier attempt, or all of them, failed."""

    client: int
    result: Any
    why: tuple[str, ...] = ()


def attempted(
    unit: Unit, train: Callable[[Unit], list[Any]], retries: int, why: tuple[str, ...] = ()
) -> list[Attempted]:
    """Returns what `train` makes of each client of a unit, in their order.

    A unit that runs out of memory is halved. Another, and a client alone, is tried `retries` times more; then the
    unit is taken apart, and each of its clients tried once. A process that loses its GPU ends.
    """
    try:
        return [Attempted(client, result, why) for client, result in zip(unit, train(unit), strict=True)]
    except Exception as error:  # whatever a client's rows, or a user's own rule, may raise
        if isinstance(error, torch.AcceleratorError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # no call of CUDA works here any more: the pool starts another process
        if isinstance(cause_of(error), AccessDenied | BaseRemoved):
            raise  # no other attempt, and no other client, would get more
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        cause = f"{type(error).__name__}: {last_line(error)}"
    # Only here does nothing refer to the error's frames any more, and to the tensors in them.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    why = (*why, cause if len(unit) == 1 else f"in lanes with clients {', '.join(map(str, unit))}: {cause}")
    if len(unit) > 1 and short:
        return [attempt for half in halves(unit) for attempt in attempted(half, train, retries, why)]
    if retries:
        return attempted(unit, train, retries - 1, why)
    if len(unit) > 1:
        return [attempt for client in unit for attempt in attempted((client,), train, 0, why)]
    return [Attempted(unit[0], None, why)]


ClientResult = tuple[Job, Update, ClientState]  # a client's job, its update, and its state after the round
TrainerOf = Callable[[Unit, BroadcastMessage], ClientTrainer]
Exposed = Callable[[int], tuple[Exposure, ...]]  # takes what a client has shown to the base's owner


def nothing_exposed(client: int) -> tuple[Exposure, ...]:
    """Returns nothing: clients have the base at home."""
    return ()


@dataclass(frozen=True)
class Peers:
    """What a process asks of the ranks that are one worker, all at the same time; `rank` is None in a group of one."""

    rank: int | None = None
    partition: Partition | None = None  # how the ranks cut vectors into shards
    summed: Callable[[float], float] = float
    largest: Callable[[float], float] = float
    from_first: Callable[[Any], Any] = lambda value: value

    def whole_norm(self, norm: float) -> float:
        """Returns the L2 norm of a vector from that of the shard at hand."""
        return norm if self.rank is None else math.sqrt(self.summed(norm * norm))


ALONE = Peers()


@dataclass
class ClientRunner:
    """A worker's clients. `trainer_of` gives the trainer of a unit; `layout` is of whole vectors, or of a rank's shard.

    There are no retries in a gang: an exception in one rank ends it.
    """

    federation: Federation
    tokens: Tokens
    states: ClientStates
    trainer_of: TrainerOf
    layout: Layout
    peers: Peers = ALONE
    exposed: Exposed = nothing_exposed

    def __post_init__(self) -> None:
        self.rows: np.ndarray = self.tokens.counts("train")  # training rows of each client (N,)

    def run(self, chunk: Sequence[Unit], message: BroadcastMessage, accumulator: Accumulator) -> list[Report]:
        """Trains units one after another; `accumulator` takes each update that counts."""
        broadcast = self.receive(message)
        units = self.tokens.in_advance(chunk)
        return [report for unit in units for report in self._unit(unit, message, broadcast, accumulator)]

    def receive(self, message: BroadcastMessage) -> Broadcast:
        """Returns what all clients here receive."""
        federation, peers = self.federation, self.peers
        broadcast = message.received(federation.strategy, self.layout, federation.seed, peers.rank)
        return replace(broadcast, whole_norm=peers.whole_norm)

    def received_by(self, client: int, broadcast: Broadcast) -> Broadcast:
        """Returns what one client receives: it knows its own LoRA rank, where ranks are mixed."""
        peft = self.federation.model.peft
        return replace(broadcast, lora_rank=peft.lora_rank_of(client, self.federation.seed))

    def rows_of(self, client: int, split: SplitName, message: BroadcastMessage) -> pa.RecordBatch:
        """Returns a client's rows, with what the reference model says of them if it is stored."""
        return message.beside(self.tokens.rows(client, split), client, split)

    def state_of(self, client: int, round_: int) -> ClientState:
        """Returns what the client keeps from the rounds before."""
        return self.states.read(client, round_) if self.federation.keeps_state else {}

    def _unit(
        self, unit: Unit, message: BroadcastMessage, broadcast: Broadcast, accumulator: Accumulator
    ) -> list[Report]:
        federation, reports = self.federation, dict[int, Report]()
        for client in unit:  # one that is too slow by the seed gets the broadcast, and need not train in vain
            steps = steps_of(int(self.rows[client]), federation.train)
            if late := federation.clients.availability.late_by_seed(client, steps, federation.seed):
                down = self._traffic(self.received_by(client, broadcast))[DOWN]
                reports[client] = Report(client, {DOWN: down, UP: 0.0}, late=late)
        present, began = tuple(client for client in unit if client not in reports), time.monotonic()

        def train(clients: Unit) -> list[ClientResult]:
            jobs = [self._job(client, message, broadcast) for client in clients]
            # Updates may be views of the trainer's memory if nothing else is trained before they are handed over.
            results = self.trainer_of(clients, message).updates(jobs, federation, view=len(present) == 1)
            return [(job, *result) for job, result in zip(jobs, results, strict=True)]

        try:
            if self.peers.rank is None:
                attempts = attempted(present, train, federation.clients.retries) if present else []
            else:
                attempts = [Attempted(client, train((client,))[0]) for client in present]
        except NonFiniteUpdate as error:  # on all ranks
            attempts = [Attempted(present[0], error)]
        trained_s = (time.monotonic() - began) / max(1, len(present))
        for attempt in attempts:
            client, result = attempt.client, attempt.result
            if result is None:
                reports[client] = Report.of_nothing(client, attempt.why)
            elif isinstance(result, NonFiniteUpdate):
                traffic = self._traffic(self.received_by(client, broadcast))
                reports[client] = Report(client, traffic, failed=str(result))
            else:
                reports[client] = replace(self._hand_over(result, message, accumulator, trained_s), tried=attempt.why)
        seconds = (time.monotonic() - began) / max(1, len(present))  # adding up large updates takes its time too
        reports |= {
            client: replace(reports[client], seconds=seconds, exposures=self.exposed(client)) for client in present
        }
        return [reports[client] for client in unit]

    def _job(self, client: int, message: BroadcastMessage, broadcast: Broadcast) -> Job:
        rows = self.rows_of(client, "train", message)
        weight = self.federation.privacy.weight(rows.num_rows, message.full_rows)
        received = self.received_by(client, broadcast)
        is_round = self.federation.train.objective.reference == "round"
        reference = received.params if is_round else message.reference_vector(self.peers.rank)
        return Job(client, rows, weight, received, self.state_of(client, broadcast.round), reference)

    def _hand_over(
        self, result: ClientResult, message: BroadcastMessage, accumulator: Accumulator, trained_s: float
    ) -> Report:
        """Encodes a client's update and lets the accumulator take it; then its state is written."""
        federation, (job, update, after) = self.federation, result
        update, kept = encode(federation.transforms, update, job.broadcast, job.state)
        traffic = self._traffic(job.broadcast, update)
        update, after = replace(update, metrics=update.metrics | traffic), after | kept
        if late := federation.clients.availability.late_by_clock(trained_s):
            return Report(job.client, traffic, late=late)
        try:
            self._refuse_useless(update, after)
            if message.noise_plan is not None and message.noise_plan.adds_to == "sum":
                finite_bound(update)
                update = message.noise_plan.encode(update, message.clip, job.broadcast.whole_norm)
            accumulator.add(update)
        except NonFiniteUpdate as error:
            return Report(job.client, traffic, failed=str(error))
        if federation.keeps_state:
            self.states.write(job.client, message.round + 1, after, message.oldest)
        return Report(job.client, update.metrics)

    def _traffic(self, broadcast: Broadcast, update: Update | None = None) -> dict[str, float]:
        """Returns the bytes that a client receives and sends, over all ranks."""
        strategy = self.federation.strategy
        down, up = strategy.floats(broadcast)
        if update is not None and (numbers := strategy.sent(update)) is not None and not self.federation.transforms:
            up = numbers
        # Transforms shorten the update alone, and not what the rule sends beside it.
        beside = max(0, up - broadcast.params.numel())
        sent = bits(self.federation.transforms, up - beside) / 8 + beside * FLOAT_BYTES
        return {DOWN: self.peers.summed(down * FLOAT_BYTES), UP: self.peers.summed(sent)}

    def _refuse_useless(self, update: Update, after: Mapping[str, Vector]) -> None:
        """Raises NonFiniteUpdate, on all ranks if one has cause, for an update or a state that nothing can use."""
        finite, bound = all(tensor.isfinite().all() for tensor in after.values()), math.nan
        if self.peers.rank is None:  # the accumulator looks at the update itself
            if not finite:
                raise NonFiniteUpdate("its new client state holds NaN or infinity")
            return
        with suppress(NonFiniteUpdate):
            bound = finite_bound(update) if finite else math.nan
        largest = self.peers.largest(bound)
        if not math.isfinite(largest):
            raise NonFiniteUpdate("its update, or its new client state, holds NaN or infinity")
        if largest >= LIMIT:
            raise NonFiniteUpdate(f"its update reaches beyond the exact sum's range of {LIMIT:.3g}")
