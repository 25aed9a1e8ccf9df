"""Evaluation on the pool: held-out losses during a run, and of other models on the same rows. Legend: P parameters."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.events import Evaluated, Event
from engine.messages.reports import FLOAT_BYTES
from engine.messages.shards import Shard, ShardedState
from engine.records.metrics import Ledger, Metrics
from engine.rounds.server import Server
from engine.scheduling.dispatcher import Later
from engine.scheduling.pool import Pool
from engine.scheduling.worker_kinds import Reference
from engine.training.evaluation import ClientLoss, mean_loss

SPLITS = ("heldout", "unseen", "server")
Losses = dict[str, float]  # split -> nats per token


@dataclass(frozen=True)
class Pending:
    """An evaluation of the model after `round` that workers do beside the next round, by split."""

    round: int
    parts: list[tuple[str, Later]]


def _evaluate(actor: Any, chunk: list[int], vector: Any, limit: int) -> Reference:
    return actor.evaluate.remote(chunk, vector, limit)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on the pool and writes their losses to the metrics and the ledger.

    A `vector` stands for a model: see Server.vector. `vector_bytes` is its size.
    """

    federation: Federation
    pool: Pool
    store: Store
    tokens: Tokens
    metrics: Metrics
    ledger: Ledger
    vector_bytes: int

    def global_model(self, vector: Any, round_: int) -> Losses:
        """Returns the loss on held-out rows, on clients that never train, and on the server's rows if it has any."""
        return self._every_split(vector, round_, "loss", protocol=True)

    def begin(self, vector: Any, round_: int) -> Pending:
        """Begins an evaluation as `global_model` does it, for workers that have nothing else to do."""
        parts = []
        for split in SPLITS:
            clients, _ = self.judged(split)
            call = partial(_evaluate, vector=vector, limit=self._limit(split))
            parts.append((split, Later.of(clients, self.pool.size, call)))
        return Pending(round_, parts)

    def end(self, pending: Pending) -> Losses:
        """Returns the losses of a pending evaluation; what no worker has had time for is done now."""
        losses = {}
        for split, later in pending.parts:
            left = np.array([client for chunk in later.chunks for client in chunk], np.int64)
            later.chunks.clear()
            later.results.extend(self.pool.map(left, self.tokens.counts("heldout")[left], later.call))
            if later.results:
                losses[split] = self._record_protocol(later.results, pending.round, split, "loss")
        return losses

    def centralized(self, start: Any, round_: int, steps: int) -> Losses:
        """Returns the loss after `steps` steps on the pooled rows: what could be had if that were allowed."""
        clients = list(range(self.store.num_training))
        trained_P = self.pool.ask(lambda actor: actor.centralised.remote(clients, start, steps), long=True)
        return self._every_split(ray.put(BroadcastMessage(round_, (Shard(trained_P, {}),))), round_, "loss_centralised")

    def not_private(self, vector: Any, round_: int) -> Losses:
        """Returns the loss of what the same federation comes to without privacy."""
        return self._every_split(vector, round_, "loss_not_private")

    def local_only(self, start: Any, round_: int, steps: np.ndarray, name: str) -> Losses:
        """Returns the loss where each client (by id) trains alone for its `steps` (N,) from `start`, as loss_`name`.

        A client without held-out rows is not evaluated, and so not trained.
        """
        clients, _ = self.judged("heldout")
        losses = self.pool.map(
            clients, steps[clients], lambda actor, chunk: actor.local_only.remote(chunk, start, steps[chunk].tolist())
        )
        return {"heldout": self._record(losses, round_, "heldout", f"loss_{name}")}

    def personal(self, broadcast: Any, round_: int) -> Losses:
        """Returns the loss of each client's own model; nothing if no client has one."""
        shared, (clients, rows), limit = ray.put(broadcast), self.judged("heldout"), self._limit("heldout")
        losses = self.pool.map(clients, rows, lambda actor, chunk: actor.evaluate_personal.remote(chunk, shared, limit))
        if not losses:
            return {}
        self._report_to_server(round_, len(losses))
        return {"heldout": self._record(losses, round_, "heldout", "loss_personal", protocol=True)}

    def judged(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the clients (N,) of a split that have rows to be evaluated on, and how many rows (N,) count."""
        training, clients = self.store.num_training, self.store.num_clients
        members = {"heldout": (0, training), "unseen": (training, clients), "server": (clients, None)}
        first, last = members[split]
        rows = np.minimum(self.tokens.counts("heldout")[first:last], self._limit(split))
        return first + np.flatnonzero(rows), rows[rows > 0]

    def _limit(self, split: str) -> int:
        """How many rows of a client count; the server is none, and has a limit of its own."""
        return self.federation.evaluate.server_rows if split == "server" else self.federation.evaluate.rows

    def _every_split(self, vector: Any, round_: int, name: str, *, protocol: bool = False) -> Losses:
        """The losses by split. A baseline is no part of the federation's `protocol`."""
        losses, record = {}, self._record_protocol if protocol else self._record
        for split in SPLITS:
            clients, rows = self.judged(split)
            if len(clients):
                call = partial(_evaluate, vector=vector, limit=self._limit(split))
                losses[split] = record(self.pool.map(clients, rows, call), round_, split, name)
        return losses

    def _record_protocol(self, losses: list[ClientLoss], round_: int, split: str, name: str) -> float:
        """As `_record`, with what the clients receive and send for it, and each client's loss."""
        if split != "server":
            self.ledger.received(round_, "client", "sum", len(losses), len(losses) * self.vector_bytes)
            self._report_to_server(round_, len(losses))
        return self._record(losses, round_, split, name, protocol=True)

    def _report_to_server(self, round_: int, clients: int) -> None:
        """Clients send their losses; under secure aggregation they do not, and the simulator alone knows them."""
        if not self.federation.privacy.secure:
            self.ledger.received(round_, "server", "metric", clients, clients * FLOAT_BYTES)

    def _record(self, losses: list[ClientLoss], round_: int, split: str, name: str, *, protocol: bool = False) -> float:
        """Writes the mean loss in nats per token and returns it."""
        if protocol and split != "server" and not self.federation.privacy.secure:
            ordered = sorted(losses, key=lambda loss: loss.client)
            names = self.store.names([loss.client for loss in ordered])
            figures = [{name: loss.nll / loss.tokens, "tokens": loss.tokens} for loss in ordered]
            self.metrics.add_each(round_, split, names, figures)
        mean, counts = mean_loss(losses), dict[str, float]()
        if protocol:
            counts = {"tokens": sum(loss.tokens for loss in losses), "rows": sum(loss.rows for loss in losses)}
        self.metrics.add(round_, split, None, **{name: mean}, **counts)
        return mean


@dataclass
class Evaluation:
    """Evaluates the model by `evaluate.every`, before the first round, and at the end.

    With `evaluate.overlap` an evaluation goes on beside the next round, and is `pending` until that has ended.
    """

    federation: Federation
    pool: Pool
    server: Server
    evaluator: Evaluator
    pending: Pending | None = None

    def before_rounds(self, state: ShardedState, *, resumed: bool) -> Iterator[Event]:
        """Evaluates the state that the run starts from, unless a resumed run has done so."""
        if not resumed or (self._is_due(state) and not self.evaluator.metrics.judged(state.round)):
            yield from self._evaluate(state, overlap=resumed and self.federation.evaluate.overlap)

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Ends the pending evaluation, and evaluates the state if it is its turn."""
        if self.pending is not None:
            pending, self.pending, self.pool.later = self.pending, None, []
            yield Evaluated(pending.round, self.evaluator.end(pending))
        last = state.round == self.federation.rounds
        overlap = self.federation.evaluate.overlap and not last
        if last or self._is_due(state):
            yield from self._evaluate(state, overlap=overlap)
            if not overlap:
                yield from self._personal(state, last=last)

    def _is_due(self, state: ShardedState) -> bool:
        every = self.federation.evaluate.every
        return every > 0 and state.round > 0 and state.round % every == 0

    def _evaluate(self, state: ShardedState, *, overlap: bool) -> Iterator[Event]:
        vector = self.server.vector(state)
        if overlap:
            self.pending = self.evaluator.begin(vector, state.round)
            self.pool.later = [later for _, later in self.pending.parts]
            return
        began = time.monotonic()
        losses = self.evaluator.global_model(vector, state.round)
        self.evaluator.metrics.add(state.round, "engine", None, evaluate_s=time.monotonic() - began)
        yield Evaluated(state.round, losses)

    def _personal(self, state: ShardedState, *, last: bool) -> Iterator[Event]:
        """The clients' own models, if they have any; at the end also the global one, trained a little by each."""
        if self.federation.strategy.personalizes:
            losses = self.evaluator.personal(self.server.broadcast(state), state.round)
            if losses:
                yield Evaluated(state.round, losses, "personal")
        if last and self.federation.evaluate.finetune:
            steps = np.full(self.evaluator.store.num_training, self.federation.evaluate.finetune)
            losses = self.evaluator.local_only(self.server.vector(state), state.round, steps, "finetuned")
            yield Evaluated(state.round, losses, "finetuned")
