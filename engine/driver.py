"""The driver actor: the round loop. It sees sums and metrics, and no weights of the base."""

import errno
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayTaskError

from datasets_partition.store import Store
from datasets_partition.tokens import Tokens
from engine.atomic import write_file, write_folder
from engine.batches import steps_of
from engine.checkpoint import Saved, load_checkpoint, save_checkpoint
from engine.client import Report
from engine.events import Evaluated, Event, Finished, Preparing, RoundDone, Sample, Started
from engine.metrics import Ledger, Metrics, read_log
from engine.runcard import model_card
from engine.scores import FLOAT_BYTES, Scores
from engine.settings import Federation
from engine.slots import Slots
from engine.sums import merge
from engine.wire import to_wire, update_from_wire
from strategies.layout import Layout
from strategies.transforms import decode
from strategies.types import Aggregate, ServerState, Strategy


@dataclass(frozen=True)
class RunPlan:
    """Where a run reads and writes, what is written at its start, and what it does beside the recipe's rounds.

    `shared` is the location elsewhere that `store` is a copy of, if it is one.
    """

    store: Path
    folder: Path
    files: dict[str, bytes]
    shared: str | None = None
    resume: bool = False
    baselines: bool = False


class Driver:
    """One run of a federation, from the first actor to the exported model."""

    def __init__(self, federation: Federation, plan: RunPlan) -> None:
        torch.set_num_threads(1)
        self.federation, self.plan = federation, plan
        self.strategy: Strategy = federation.strategy

    def run(self) -> Iterator[Event]:
        """Yields events until the run has ended; what the user can mend comes as ValueError."""
        try:
            yield from self._run()
        except OSError as error:  # from here, or from a slot: then Ray's own kind of it, which has lost the number
            cause: BaseException = error
            while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
                cause = cause.cause
            if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"the disk that holds {self.plan.folder} is full; free some space and run again with --resume: "
                f"what was written before is whole"
            ) from error

    def _run(self) -> Iterator[Event]:
        federation, plan = self.federation, self.plan
        yield Preparing("starting slots, reading the base, tokenizing rows")
        self.slots = Slots(federation, plan.folder / "memory")
        start = self.slots.start(plan.store, plan.shared)
        self.store, self.tokens = Store.open(plan.store), Tokens.open(start.tokens)
        self._refuse_empty_clients()
        federation.cohort.sample(self.store.num_training, federation.seed, 0)

        saved = load_checkpoint(plan.folder / "checkpoints") if plan.resume else None
        fresh = Saved(self.strategy.init(torch.from_numpy(start.initial), start.layout), 0.0)
        initial, state = self._known(fresh.state, start.layout), self._known((saved or fresh).state, start.layout)
        wall_s = (saved or fresh).wall_s
        if state.params.shape != (start.layout.size,):
            raise ValueError(
                f"the checkpoint holds {len(state.params)} parameters, the recipe's model has {start.layout.size}"
            )
        for name, content in plan.files.items():
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_file(plan.folder / name, content)
        if federation.remembers:
            (plan.folder / "memory").mkdir(exist_ok=True)
            self.slots.refuse_lost_memory()
        self.metrics = Metrics(plan.folder / "metrics", wall_s)
        self.ledger = Ledger(plan.folder / "ledger")
        for log in (self.metrics, self.ledger):
            log.forget_after(state.round if saved else -1)
        self.scores = Scores(federation, self.slots, self.store, self.tokens, self.metrics, self.ledger)
        dropped = int(self.tokens.dropped("train").sum() + self.tokens.dropped("heldout").sum())
        training, unseen = self.store.num_training, self.store.num_clients - self.store.num_training
        resumed = saved.state.round if saved else None
        asked = federation.clients.slots
        parameters, on_cpu = start.layout.size, start.without_gpu
        yield Started(start.slots, asked, training, unseen, dropped, parameters, start.base_bytes, on_cpu, resumed)

        if saved is None:
            yield self._evaluate(state)
            self._flush(state)
        elif state.residual is not None:
            self.slots.rebase(state.residual.numpy())
        while state.round < federation.rounds:
            state, done = self._round(state)
            yield done
            last = state.round == federation.rounds
            if last or (federation.evaluate.every and state.round % federation.evaluate.every == 0):
                yield self._evaluate(state)
                yield from self._personal(state)
            if last and plan.baselines:
                yield from self._baselines(initial, state)
            self._flush(state)
            if last or state.round % federation.checkpoint.every == 0:
                kept = federation.checkpoint.keep
                save_checkpoint(plan.folder / "checkpoints", Saved(state, self.metrics.wall_s), kept)
        yield self._finish(initial, state)
        self.slots.stop()

    def _round(self, state: ServerState) -> tuple[ServerState, RoundDone]:
        federation, round_ = self.federation, state.round + 1
        began = time.monotonic()
        cohort = federation.cohort.sample(self.store.num_training, federation.seed, state.round)
        wire = to_wire(self.strategy.broadcast(state), self._oldest(state.round))
        reports, partials, each = self.slots.train(cohort, self._steps(cohort), ray.put(wire))
        self._refuse_failures(reports, round_)
        trained = time.monotonic()
        if not len(cohort):  # a Poisson cohort may be empty: nobody moves the model
            state = replace(state, round=round_)
        else:
            state = self._applied(state, merge(partials) if self.strategy.reads == "sum" else self._listed(each))
        ended = time.monotonic()
        seconds = ended - began

        good = [report for report in reports if report.failed is None]
        failed = {self.store.name(r.client): r.failed for r in reports if r.failed is not None}
        for report in good:
            self.metrics.add(round_, "train", self.store.name(report.client), **report.metrics)
        tokens = sum(report.metrics["tokens"] for report in good)
        learnt = sum(report.metrics["learnt"] for report in good)
        summed = sum(report.metrics["loss"] * report.metrics["learnt"] for report in good)
        loss = summed / learnt if learnt else math.nan
        self.metrics.add(round_, "train", None, loss=loss, tokens=tokens)
        vectors = [wire.params, *wire.extras.values()]
        down = round(sum(report.metrics["protocol_bytes_down"] for report in reports))
        up = round(sum(report.metrics["protocol_bytes_up"] for report in reports))
        moved = sum(vector.nbytes for vector in vectors) + len(each) * wire.params.nbytes
        moved += sum(vector.nbytes for partial in partials for vector in partial.vectors.values())
        self.metrics.add(
            round_,
            "engine",
            None,
            round_s=seconds,
            apply_s=ended - trained,
            tokens_per_s=tokens / seconds,
            clients=len(good),
            failed=len(failed),
            protocol_bytes_down=down,
            protocol_bytes_up=up,
            store_bytes=moved,
        )
        self.ledger.received(round_, "client", "sum", len(reports) if down else 0, down)
        self.ledger.received(round_, "server", "update", len(reports) if up else 0, up)
        figures = sum(not name.startswith("protocol_") for report in good for name in report.metrics)
        self.ledger.received(round_, "server", "metric", figures, figures * FLOAT_BYTES)
        return state, RoundDone(round_, loss, seconds, tokens / seconds, len(good), failed)

    def _known(self, state: ServerState, layout: Layout) -> ServerState:
        """The state with what no checkpoint holds, since it never changes."""
        return replace(state, layout=layout, seed=self.federation.seed, population=self.store.num_training)

    def _listed(self, each: dict[int, Any]) -> Aggregate:
        """The single updates in the order of clients, mapped from the object store; nobody has added them up."""
        found = [ray.get(each[client]) for client in sorted(each)]
        updates = tuple(update_from_wire(update) for update in found if update is not None)
        if not updates:
            raise ValueError("no client of the cohort gave an update, so there is nothing to choose from")
        nothing = torch.zeros_like(updates[0].delta)
        return Aggregate(sum(update.weight for update in updates), nothing, {}, len(updates), updates)

    def _applied(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The next state: what clients did to their updates is undone in reverse, then the rule is applied."""
        aggregate, state = decode(self.federation.transforms, aggregate, state)
        after = self.strategy.apply(state, aggregate)
        if after.residual is not state.residual:
            self.slots.rebase(None if after.residual is None else after.residual.numpy())
        return after

    def _oldest(self, round_: int) -> int:
        """The round of the oldest checkpoint that a run could be resumed from after this one."""
        every, keep = self.federation.checkpoint.every, self.federation.checkpoint.keep
        return max(0, (round_ // every - keep) * every)

    def _evaluate(self, state: ServerState) -> Evaluated:
        began = time.monotonic()
        losses = self.scores.global_model(state.params.numpy(), state.round)
        self.metrics.add(state.round, "engine", None, evaluate_s=time.monotonic() - began)
        return Evaluated(state.round, losses)

    def _personal(self, state: ServerState) -> Iterator[Evaluated]:
        """The clients' own models, where they have any; at the end also the global one, trained a little by each."""
        if self.strategy.personalises:
            losses = self.scores.personal(to_wire(self.strategy.broadcast(state)), state.round)
            if losses:
                yield Evaluated(state.round, losses, "personal")
        if self.federation.evaluate.finetune and state.round == self.federation.rounds:
            steps = np.full(self.store.num_training, self.federation.evaluate.finetune)
            losses = self.scores.local_only(state.params.numpy(), state.round, steps, "finetuned")
            yield Evaluated(state.round, losses, "finetuned")

    def _baselines(self, initial: ServerState, state: ServerState) -> Iterator[Evaluated]:
        """Both baselines spend the federation's steps: all in one model, or in equal parts in each client's."""
        if state.residual is not None:
            self.slots.rebase(None)
        federation, clients = self.federation, self.store.num_training
        cohorts = [federation.cohort.sample(clients, federation.seed, past) for past in range(federation.rounds)]
        total = int(sum(self._steps(cohort).sum() for cohort in cohorts))
        # The remainder goes to some clients, one step each; where there are fewer steps than clients, all take one.
        each = np.maximum(1, total // clients + (np.arange(clients) < total % clients))
        start, round_ = initial.params.numpy(), state.round
        yield Evaluated(round_, self.scores.local_only(start, round_, each, "local_only"), "local_only")
        yield Evaluated(round_, self.scores.centralised(start, round_, total), "centralised")
        if state.residual is not None:
            self.slots.rebase(state.residual.numpy())

    def _steps(self, clients: np.ndarray) -> np.ndarray:
        """How many steps each of the clients takes in a round."""
        return np.array([steps_of(int(rows), self.federation.train) for rows in self.tokens.counts("train")[clients]])

    def _finish(self, initial: ServerState, state: ServerState) -> Finished:
        folder = self.plan.folder
        losses = loss_table(read_log(folder / "metrics"), state.round)
        after = self.scores.continued(state.params.numpy())
        card = model_card(self.federation, losses, self.store.manifest, merged=state.residual is not None)
        files = self.slots.ask(lambda actor: actor.export.remote(state.params.numpy(), card))
        if state.residual is not None:
            self.slots.rebase(None)
        before = self.scores.continued(initial.params.numpy())
        samples = [Sample(*row, b, a) for row, b, a in zip(self.scores.sample_rows, before, after, strict=True)]
        write_file(folder / "samples.json", json.dumps([asdict(s) for s in samples], indent=1).encode())
        write_folder(folder / "model", files)
        return Finished(folder, losses, samples)

    def _flush(self, state: ServerState) -> None:
        self.metrics.flush(state.round)
        self.ledger.flush(state.round)

    def _refuse_empty_clients(self) -> None:
        empty = self.tokens.empty_clients()
        if empty:
            raise ValueError(
                f"{len(empty)} clients have no training row left after the cut to train.max_length = "
                f"{self.federation.train.max_length}, which takes their whole completions: {_few(empty)}; "
                f"raise train.max_length, or drop small clients with data.splits.min_rows"
            )

    def _refuse_failures(self, reports: list[Report], round_: int) -> None:
        failed = [report for report in reports if report.failed is not None]
        if len(failed) > self.federation.clients.max_failed * len(reports):
            names = [self.store.name(report.client) for report in failed]
            raise ValueError(
                f"{len(failed)} of {len(reports)} clients of round {round_} gave no usable update, more than "
                f"clients.max_failed = {self.federation.clients.max_failed:g} allows: {_few(names)}: "
                f"{failed[0].failed}; lower train.optimizer.lr, or raise clients.max_failed"
            )


def loss_table(metrics: pa.Table, last: int) -> dict[str, dict[str, float]]:
    """Aggregate losses by column (round 0, end, baselines) and split, from a run's metrics."""
    columns = {("loss", 0): "round 0", ("loss_local_only", last): "local only"}
    columns |= {("loss_centralised", last): "centralised", ("loss", last): "end"}
    columns |= {("loss_personal", last): "personal", ("loss_finetuned", last): "fine-tuned"}
    table: dict[str, dict[str, float]] = {}
    for row in metrics.to_pylist():
        column = columns.get((row["name"], row["round"]))
        if column and row["client"] is None and row["split"] in ("heldout", "unseen", "server"):
            table.setdefault(column, {})[row["split"]] = row["value"]
    return table


def _few(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
