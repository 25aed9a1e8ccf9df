"""Evaluates models on the pool: held-out losses during a run, and those of baselines. Legend: P parameters."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config.privacy import Privacy
from engine.messages.broadcast import BroadcastMessage, share
from engine.messages.errors import RunError
from engine.messages.events import Evaluated, Event, Fault
from engine.messages.reports import FLOAT_BYTES
from engine.messages.shards import ShardedState, borrow
from engine.objectives.figures import shown_names
from engine.records.logs import Logs
from engine.records.metrics import ROLLOUTS
from engine.rounds.round_loop import RoundLoop, RunSetup, round_loop
from engine.rounds.server import merge_into_base
from engine.scheduling.dispatcher import Later
from engine.scheduling.worker_kinds import Reference
from engine.system.atomic import write_file
from engine.training.generation import as_text
from engine.workers.evaluator import ClientLoss, pooled
from strategies.core.protocol import Broadcast
from strategies.core.seeds import rng

CHUNKS = 2  # of clients for each slot
SPLITS = ("heldout", "unseen", "server")


@dataclass(frozen=True)
class Pending:
    """An evaluation of the model after `round`, which `shared` carries, that workers do beside the next round."""

    round: int
    shared: Any
    by_split: list[tuple[str, Later]]


@dataclass(frozen=True)
class PoolEvaluator:
    """Evaluates models on the pool and writes their losses. A `message` carries a model."""

    setup: RunSetup
    logs: Logs

    def losses(
        self, message: BroadcastMessage, round_: int, baseline: str | None = None, *, protocol: bool = False
    ) -> Evaluated:
        """Evaluates each split that has rows; a baseline is outside of the federation's `protocol`."""
        return self.end(self.begin(message, round_), baseline, protocol=protocol)

    def begin(self, message: BroadcastMessage, round_: int) -> Pending:
        """Begins an evaluation, for workers that have nothing else to do."""
        shared = share(message)

        def later(split: str) -> Later:
            limit, chunks = self._limit(split), np.array_split(self.judged(split), CHUNKS * self.setup.pool.size)
            left = deque(chunk.tolist() for chunk in chunks if len(chunk))
            return Later(left, lambda actor, chunk: actor.evaluate.remote(chunk, shared, limit))

        return Pending(round_, shared, [(split, later(split)) for split in SPLITS])

    def end(self, pending: Pending, baseline: str | None = None, *, protocol: bool = True) -> Evaluated:
        """Ends a pending evaluation; evaluates now what no worker has had time for."""
        losses = {}
        for split, later in pending.by_split:
            left = np.array([client for chunk in later.chunks for client in chunk], np.int64)
            later.chunks.clear()
            later.results.extend(self._map(left, split, later.call))
            if later.results:
                losses[split] = self._record(later.results, pending.round, split, baseline, protocol=protocol)
        if protocol and baseline is None and self.setup.federation.train.objective.judges_samples:
            self._write_rollouts(pending)
        return self._event(pending.round, losses, baseline)

    def local_only(self, message: BroadcastMessage, round_: int, steps: np.ndarray, baseline: str) -> Evaluated:
        """Evaluates a baseline for which each client that is evaluated trains alone for its `steps` (N,)."""
        shared, clients = share(message), self.judged("heldout")
        losses = self.setup.pool.map(
            clients, steps[clients], lambda actor, chunk: actor.local_only.remote(chunk, shared, steps[chunk].tolist())
        )
        return self._event(round_, {"heldout": self._record(losses, round_, "heldout", baseline)}, baseline)

    def personal(self, message: BroadcastMessage, round_: int) -> Evaluated:
        """Evaluates each client's own model; the result is empty if no client has one."""
        shared, clients, limit = share(message), self.judged("heldout"), self._limit("heldout")
        losses = self._map(clients, "heldout", lambda actor, some: actor.evaluate_personal.remote(some, shared, limit))
        means = {"heldout": self._record(losses, round_, "heldout", "personal", protocol=True)} if losses else {}
        return self._event(round_, means, "personal")

    def emulator(self, message: BroadcastMessage, round_: int) -> Evaluated:
        """Evaluates the model that clients train in the base's place."""
        shared, losses = share(message), dict[str, ClientLoss]()
        for split in ("heldout", "unseen"):
            limit = self._limit(split)

            def call(actor: Any, some: list[int], limit: int = limit) -> Reference:
                return actor.evaluate_emulator.remote(some, shared, limit)

            if results := self._map(self.judged(split), split, call):
                losses[split] = self._record(results, round_, split, "emulator")
        return self._event(round_, losses, "emulator")

    def judged(self, split: str) -> np.ndarray:
        """Returns the clients (N,) of a split that have rows to be evaluated on."""
        training, clients = self.setup.store.num_training, self.setup.store.num_clients
        first, last = {"heldout": (0, training), "unseen": (training, clients), "server": (clients, None)}[split]
        return first + np.flatnonzero(self.setup.tokens.counts("heldout")[first:last])

    def shown_rows(self) -> list[pa.Table]:
        """Returns a held-out row of each of a few unseen (else training) clients, drawn by the seed."""
        federation, store, unseen = self.setup.federation, self.setup.store, self.judged("unseen")
        clients = unseen if len(unseen) else self.judged("heldout")
        draw = rng(federation.seed, 0, -1, "sample")
        chosen = draw.choice(clients, min(federation.samples, len(clients)), replace=False)
        return [store.read_rows(int(client), "heldout").slice(0, 1) for client in chosen]

    def _write_rollouts(self, pending: Pending) -> None:
        """Writes what the model makes of a few held-out prompts, with its rewards, as JSON."""
        if not (rows := self.shown_rows()):
            return
        table, sample = pa.concat_tables(rows), self.setup.federation.train.objective.sample
        shown = self.setup.pool.ask(lambda actor: actor.rollouts.remote(pending.shared, table))
        prompts = [as_text(sample(row)[0]) for row in table.to_pylist()]
        pairs = zip(prompts, shown, strict=True)
        content = [{"prompt": prompt, **answers} for prompt, answers in pairs if answers is not None]
        folder = self.setup.folder / ROLLOUTS
        folder.mkdir(exist_ok=True)
        write_file(folder / f"{pending.round:06d}.json", json.dumps(content, indent=1).encode())

    def _map(self, clients: np.ndarray, split: str, call: Callable[[Any, list[int]], Reference]) -> list[Any]:
        costs = np.minimum(self.setup.tokens.counts("heldout")[clients], self._limit(split))
        return self.setup.pool.map(clients, costs, call)

    def _limit(self, split: str) -> int:
        """The most rows that count: `server_rows` of the server's rows, `rows` of a client's."""
        return self.setup.federation.evaluate.server_rows if split == "server" else self.setup.federation.evaluate.rows

    def _record(
        self, losses: list[ClientLoss], round_: int, split: str, baseline: str | None, *, protocol: bool = False
    ) -> ClientLoss:
        """Writes the mean losses, a baseline's as "loss_BASELINE", and returns the losses over all units of a split.

        In the `protocol` clients receive the global model and send their losses, but not under secure aggregation.
        """
        logs, count, objective = self.logs, len(losses), self.setup.federation.train.objective
        name = "loss" if baseline is None else f"loss_{baseline}"
        if protocol and split != "server":
            if baseline is None:
                logs.ledger.received(round_, "client", "sum", count, count * self.setup.pool.layout.size * FLOAT_BYTES)
            if not self.setup.federation.privacy.secure:
                logs.ledger.received(round_, "server", "metric", count, count * FLOAT_BYTES)
                ordered = sorted(losses, key=lambda loss: loss.client)
                names = self.setup.store.names([loss.client for loss in ordered])
                logs.metrics.add_each(round_, split, names, [loss.metrics(name, objective) for loss in ordered])
        pooled_loss = pooled(losses, objective)
        metrics = pooled_loss.metrics(name, objective)
        counts = {"tokens": metrics.pop("tokens"), "rows": float(pooled_loss.rows)}
        logs.metrics.add(round_, split, None, **metrics, **(counts if protocol else {}))
        return pooled_loss

    def _event(self, round_: int, losses: dict[str, ClientLoss], baseline: str | None) -> Evaluated:
        """Says what was evaluated, by split."""
        objective = self.setup.federation.train.objective
        means = {split: loss.metrics("loss", objective) for split, loss in losses.items()}
        figures = {name: {split: of[f"loss.{name}"] for split, of in means.items()} for name in shown_names(objective)}
        return Evaluated(round_, {split: of["loss"] for split, of in means.items()}, baseline, figures)


@dataclass
class Evaluation:
    """Evaluates the model by `evaluate.every`, before the first round, and at the end.

    With `evaluate.overlap` an evaluation goes on beside the next round, and is `pending` until that has ended.
    """

    evaluator: PoolEvaluator
    pending: Pending | None = None

    def before_rounds(self, state: ShardedState, *, resumed: bool) -> Iterator[Event]:
        """Evaluates the state that the run starts from, unless a resumed run has done so."""
        if not resumed or (self._is_due(state) and not self.evaluator.logs.metrics.judged(state.round)):
            yield from self._evaluate(state, overlap=resumed and self.evaluator.setup.federation.evaluate.overlap)

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Ends the pending evaluation, and evaluates the state if it is its turn."""
        federation, pool = self.evaluator.setup.federation, self.evaluator.setup.pool
        if self.pending is not None:
            pending, self.pending, pool.later = self.pending, None, []
            yield self.evaluator.end(pending)
        last = state.round == federation.rounds
        if last or self._is_due(state):
            overlap = federation.evaluate.overlap and not last
            yield from self._evaluate(state, overlap=overlap)
            if not overlap:
                yield from self._personal(state, last=last)

    def _is_due(self, state: ShardedState) -> bool:
        every = self.evaluator.setup.federation.evaluate.every
        return every > 0 and state.round > 0 and state.round % every == 0

    def _evaluate(self, state: ShardedState, *, overlap: bool) -> Iterator[Event]:
        evaluator, setup, began = self.evaluator, self.evaluator.setup, time.monotonic()
        message = setup.server.model_message(state)
        if overlap:
            self.pending = evaluator.begin(message, state.round)
            setup.pool.later = [later for _, later in self.pending.by_split]
            return
        evaluated = evaluator.losses(message, state.round, protocol=True)
        evaluator.logs.metrics.add(state.round, "engine", None, evaluate_s=time.monotonic() - began)
        yield evaluated
        if setup.federation.model.peft.plugs_in:
            yield evaluator.emulator(message, state.round)

    def _personal(self, state: ShardedState, *, last: bool) -> Iterator[Event]:
        """The clients' own models, if they have any; at the end also the global one, trained a little by each."""
        evaluator, setup = self.evaluator, self.evaluator.setup
        if setup.federation.strategy.personalizes:
            personal = evaluator.personal(setup.server.broadcast_message(state), state.round)
            if personal.losses:
                yield personal
        if last and setup.federation.evaluate.finetune:
            steps = np.full(setup.population, setup.federation.evaluate.finetune)
            yield evaluator.local_only(setup.server.model_message(state), state.round, steps, "finetuned")


def baselines(evaluator: PoolEvaluator, loop: RoundLoop, state: ShardedState) -> Iterator[Event]:
    """Spends the federation's steps on one pooled model, and in equal shares on each client's own; evaluates both.

    Every round has an equal share of a model's steps, with the learning rates of `train.over_rounds` and `over_steps`.
    """
    setup, server, clients = evaluator.setup, evaluator.setup.server, evaluator.setup.population
    if evaluator.logs.metrics.judged(state.round, "loss_centralized"):  # before the run was resumed
        return
    merge_into_base(server, state, None)
    total = loop.planner.total_steps()
    # The remainder goes to some clients, one step each; if there are fewer steps than clients, all take one.
    steps = np.maximum(1, total // clients + (np.arange(clients) < total % clients))
    message = server.model_message(setup.initial)
    yield evaluator.local_only(message, state.round, steps, "local_only")
    shared = share(message)
    trained_P = setup.pool.ask(lambda actor: actor.centralized.remote([*range(clients)], shared, total), long=True)
    pooled_message = BroadcastMessage.of(Broadcast(state.round, borrow(trained_P)))
    pooled_message = replace(pooled_message, reference=message.reference, row_column=message.row_column)
    yield evaluator.losses(pooled_message, state.round, "centralized")
    merge_into_base(server, None, state)


def without_privacy(evaluator: PoolEvaluator, loop: RoundLoop, state: ShardedState) -> Iterator[Event]:
    """Shows what privacy costs: plays the rounds again without it, of which only faults and losses are written."""
    setup, federation, recorder = evaluator.setup, evaluator.setup.federation, loop.recorder
    if evaluator.logs.metrics.judged(state.round, "loss_not_private"):  # before the run was resumed
        return
    privacy = Privacy(rows_cap=federation.privacy.rows_cap)
    evaluate = replace(federation.evaluate, without_privacy=False)
    setup = replace(setup, federation=replace(federation, privacy=privacy, evaluate=evaluate))
    logs = Logs.under(setup.folder)
    plain_loop = round_loop(setup, logs, loop.lanes)
    merge_into_base(setup.server, state, None)
    plain = setup.initial
    try:
        while plain.round < federation.rounds:
            plain, played = plain_loop.play(plain)
            logs.clear()
            recorder.logs.faults.happened(state.round, played.faults, recorder.logs.metrics.wall_s)
    except RunError as error:  # such as training that diverges where nothing is clipped; the run itself has its model
        recorder.faults([Fault("round", str(plain.round + 1), f"played again without privacy: {error}")])
    else:
        yield evaluator.losses(setup.server.model_message(plain), state.round, "not_private")
    merge_into_base(setup.server, plain, state)
