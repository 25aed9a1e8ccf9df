"""The driver actor: the round loop. It sees sums and metrics, and no weights of the base."""

import errno
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ray.exceptions import OutOfDiskError

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.compatibility import in_the_way_of_packs
from engine.config.federation import Federation
from engine.config.privacy import Privacy
from engine.messages.events import Checkpointed, Evaluated, Event, Fault, Finished, Preparing, Sample, Started, Stopped
from engine.messages.reports import FLOAT_BYTES
from engine.models.model_card import model_card
from engine.records.checkpoint import State, load_checkpoint, save_checkpoint
from engine.records.metrics import Faults, Ledger, Logs, Metrics, loss_table
from engine.rounds.evaluation import Begun, Scores
from engine.rounds.round_loop import Rounds, few
from engine.rounds.server import Server, ShardServer, WholeServer
from engine.scheduling.pool import Pool
from engine.system.allocator import use_large_pages
from engine.system.atomic import write_file
from engine.system.failures import cause_of
from engine.training.judging import as_text
from strategies.core.protocol import ServerState, Strategy


@dataclass(frozen=True)
class RunPlan:
    """Where a run reads and writes, what is written at its start, and what it does beside the recipe's rounds.

    `shared` is the location elsewhere that `store` is a copy of, if it is one. `lost` says why drivers before this one
    have ended. `elsewhere` is the URI that `folder` is copied to, if it is; `notes` are for the user, before it begins.
    """

    store: Path
    folder: Path
    files: dict[str, bytes]
    shared: str | None = None
    resume: bool = False
    baselines: bool = False
    lost: tuple[Fault, ...] = ()
    elsewhere: str | None = None
    notes: tuple[str, ...] = ()


class Driver:
    """One run of a federation, from the first actor to the exported model."""

    def __init__(self, federation: Federation, plan: RunPlan) -> None:
        use_large_pages()
        torch.set_num_threads(1)
        self.federation, self.plan = federation, plan
        self.strategy: Strategy = federation.strategy
        self.stopping = False

    def stop(self) -> None:
        """Lets the present round be the last: it is finished, and its checkpoint written."""
        self.stopping = True

    def run(self) -> Iterator[Event]:
        """Yields events until the run has ended; what the user can mend comes as ValueError."""
        try:
            with ExitStack() as at_end:
                yield from self._run(at_end)
        except OutOfDiskError as error:
            raise ValueError(
                "Ray's object store is full, and so is the disk that it spills to (--temp-dir of `ray start`, or "
                "/tmp/ray): free some space there and run again with --resume: what was written before is whole"
            ) from error
        except OSError as error:  # from here, or from a slot: then Ray's own kind of it, which has lost the number
            cause = cause_of(error)
            if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"the disk that holds {self.plan.folder} is full; free some space and run again with --resume: "
                f"what was written before is whole"
            ) from error

    def _run(self, at_end: ExitStack) -> Iterator[Event]:
        federation, plan = self.federation, self.plan
        yield Preparing("starting slots, reading the base, tokenizing rows")
        memory = plan.folder / "memory"
        self.slots = Pool(federation, memory)
        start = self.slots.start(plan.store, plan.shared)
        self.store, self.tokens = Store.open(plan.store), Tokens.open(start.tokens)
        self._refuse_empty_clients()
        federation.cohort.sample(self.store.num_training, federation.seed, 0)

        saved = load_checkpoint(plan.folder / "checkpoints") if plan.resume else None
        population = self.store.num_training
        if self.slots.partition is not None:
            self.server: Server = ShardServer(self.slots, population)
        else:
            self.server = WholeServer(federation, self.slots, start, population)
        initial = self.server.initial()
        state = self.server.loaded(saved.state) if saved else initial
        self.metrics = Metrics(plan.folder / "metrics", saved.wall_s if saved else 0.0)
        self.ledger = Ledger(plan.folder / "ledger", federation.privacy.secagg.mode)
        self.faults = Faults(plan.folder / "faults")
        logs = Logs(self.metrics, self.ledger, self.faults)
        layout, folder, copy = start.layout, plan.folder, plan.elsewhere
        self.rounds = Rounds(federation, self.slots, self.server, self.store, self.tokens, layout, folder, logs, copy)
        at_end.callback(self._write_last_faults)
        lanes = saved.lanes if saved else self._lanes(initial)
        notes = plan.notes + self.rounds.prepare(initial, saved, lanes) + (saved.passed_over if saved else ())
        for name, content in plan.files.items():
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_file(plan.folder / name, content)
        if federation.remembers:
            (plan.folder / "memory").mkdir(exist_ok=True)
            self.slots.refuse_lost_memory()
        for log in logs:
            log.forget_after(state.round if saved else -1)
        self.rounds.faults(*plan.lost)
        self.faults.flush(self.rounds.round)
        vector_bytes = start.layout.size * FLOAT_BYTES
        self.scores = Scores(federation, self.slots, self.store, self.tokens, self.metrics, self.ledger, vector_bytes)
        dropped = int(self.tokens.dropped("train").sum() + self.tokens.dropped("heldout").sum())
        training, unseen = self.store.num_training, self.store.num_clients - self.store.num_training
        resumed = saved.state.round if saved else None
        asked = federation.clients.slots
        parameters, on_cpu = start.layout.size, start.without_gpu
        yield Started(
            start.slots, asked, training, unseen, dropped, parameters, start.base_bytes, on_cpu, resumed, lanes, notes
        )

        begun = None
        if saved is None:
            yield self._evaluate(state)
            self._flush(state)
        else:
            self._rebase_to(state)
            if self._due(state) and not self.metrics.judged(state.round):
                begun = self._begun(state)
                if begun is None:  # it was to go on beside the next round, and now rounds wait
                    yield self._evaluate(state)
        while state.round < federation.rounds:
            self.slots.later = [later for _, later in begun.parts] if begun else []
            state, done = self.rounds.play(state)
            yield done
            if begun:
                yield Evaluated(begun.round, self.scores.ended(begun))
            last = state.round == federation.rounds
            begun = None if last else self._begun(state)
            if last or (begun is None and self._due(state)):
                yield self._evaluate(state)
                yield from self._personal(state)
            if last and plan.baselines:
                yield from self._baselines(initial, state)
            if last and federation.evaluate.without_privacy:
                yield self._without_privacy(initial, state)
            self._flush(state)
            if last or self.stopping or state.round % federation.checkpoint.every == 0:
                kept = federation.checkpoint.keep
                reached = self.rounds.saved(state, self.metrics.wall_s)
                save_checkpoint(plan.folder / "checkpoints", reached, kept)
                yield Checkpointed(state.round)
            if self.stopping and not last:
                yield Stopped(state.round)
                self.slots.stop()
                return
        yield self._finish(initial, state)
        self.slots.stop()

    def _lanes(self, initial: State) -> int:
        """How many clients a pack trains at once."""
        asked, clients, cohort = self.federation.clients.pack, self.store.num_training, self.federation.cohort
        if asked != "auto":
            return min(asked, max(1, cohort.largest(clients)))
        # Beside gangs nothing is measured. No pack is so large that slots would be without any.
        most = int(cohort.expected(clients)) // self.slots.size
        if in_the_way_of_packs(self.federation) or self.federation.clients.zero or most < 2:
            return 1
        sent = self.server.sent(initial)
        neighbours = max(Counter(self.slots.nodes.values()).values())
        found: int = self.slots.ask(lambda actor: actor.best_pack.remote(sent, most, clients, neighbours))
        return found

    def _rebase_to(self, state: State) -> None:
        if isinstance(state, ServerState) and state.residual is not None:
            self.slots.rebase(state.residual.numpy())

    def _forget_residual(self, state: State) -> None:
        if isinstance(state, ServerState) and state.residual is not None:
            self.slots.rebase(None)

    def _due(self, state: State) -> bool:
        every = self.federation.evaluate.every
        return every > 0 and state.round > 0 and state.round % every == 0

    def _begun(self, state: State) -> Begun | None:
        """The evaluation of a state that goes on beside the next round, if it is to."""
        if not self.federation.evaluate.overlap or not self._due(state):
            return None
        return self.scores.begun(self.server.sent(state), state.round)

    def _evaluate(self, state: State) -> Evaluated:
        began = time.monotonic()
        losses = self.scores.global_model(self.server.sent(state), state.round)
        self.metrics.add(state.round, "engine", None, evaluate_s=time.monotonic() - began)
        return Evaluated(state.round, losses)

    def _personal(self, state: State) -> Iterator[Evaluated]:
        """The clients' own models, where they have any; at the end also the global one, trained a little by each."""
        if self.strategy.personalises:
            losses = self.scores.personal(self.server.broadcast(state), state.round)
            if losses:
                yield Evaluated(state.round, losses, "personal")
        if self.federation.evaluate.finetune and state.round == self.federation.rounds:
            steps = np.full(self.store.num_training, self.federation.evaluate.finetune)
            losses = self.scores.local_only(self.server.sent(state), state.round, steps, "finetuned")
            yield Evaluated(state.round, losses, "finetuned")

    def _baselines(self, initial: State, state: State) -> Iterator[Evaluated]:
        """Both baselines spend the federation's steps: all in one model, or in equal parts in each client's."""
        self._forget_residual(state)
        federation, clients = self.federation, self.store.num_training
        cohorts = [federation.cohort.sample(clients, federation.seed, past) for past in range(federation.rounds)]
        total = int(sum(self.rounds.steps(cohort).sum() for cohort in cohorts))
        # The remainder goes to some clients, one step each; where there are fewer steps than clients, all take one.
        each = np.maximum(1, total // clients + (np.arange(clients) < total % clients))
        start, round_ = self.server.sent(initial), state.round
        yield Evaluated(round_, self.scores.local_only(start, round_, each, "local_only"), "local_only")
        yield Evaluated(round_, self.scores.centralised(start, round_, total), "centralised")
        self._rebase_to(state)

    def _without_privacy(self, initial: State, state: State) -> Evaluated:
        """Where the same rounds lead without noise and without secure aggregation; of them nothing is written down."""
        evaluate, folder = replace(self.federation.evaluate, without_privacy=False), self.plan.folder
        federation = replace(self.federation, privacy=Privacy(), evaluate=evaluate)
        # Never flushed.
        nowhere = Logs(Metrics(folder / "metrics"), Ledger(folder / "ledger"), Faults(folder / "faults"))
        layout = self.rounds.layout
        rounds = Rounds(federation, self.slots, self.server, self.store, self.tokens, layout, folder, nowhere)
        rounds.prepare(initial, None, self.rounds.lanes)
        self._forget_residual(state)
        plain = initial
        while plain.round < federation.rounds:
            plain, done = rounds.play(plain)
            self.faults.happened(state.round, done.faults, self.metrics.wall_s)
        losses = self.scores.not_private(self.server.sent(plain), state.round)
        self._forget_residual(plain)
        self._rebase_to(state)
        return Evaluated(state.round, losses, "not_private")

    def _finish(self, initial: State, state: State) -> Finished:
        folder = self.plan.folder
        losses = loss_table(folder / "metrics", state.round)
        sent = self.server.sent(state)
        merged, spent = isinstance(state, ServerState) and state.residual is not None, self.rounds.spent()
        card = model_card(self.federation, losses, self.store.manifest, merged=merged, spent=spent)
        self.slots.export(folder / "model", sent, card)  # first of all: the run is for the sake of it
        after = self.scores.continued(sent)
        del sent  # the store need not hold both
        self._forget_residual(state)
        before = self.scores.continued(self.server.sent(initial))
        samples = [
            Sample(as_text(prompt), own, b, a)
            for (prompt, own), b, a in zip(self.scores.sample_rows, before, after, strict=True)
        ]
        write_file(folder / "samples.json", json.dumps([asdict(s) for s in samples], indent=1).encode())
        return Finished(folder, losses, samples)

    def _flush(self, state: State) -> None:
        for log in (self.metrics, self.ledger, self.faults):
            log.flush(state.round)

    def _write_last_faults(self) -> None:
        """Of what went wrong after the last round, or ended the run in the midst of one."""
        self.rounds.faults()
        with suppress(OSError):  # the disk may be what went wrong
            self.faults.flush(self.rounds.round)

    def _refuse_empty_clients(self) -> None:
        empty = self.tokens.empty_clients()
        if empty:
            raise ValueError(
                f"{len(empty)} clients have no training row left after the cut to train.max_length = "
                f"{self.federation.train.max_length}, which takes their whole completions: {few(empty)}; "
                f"raise train.max_length, or drop small clients with data.splits.min_rows"
            )
