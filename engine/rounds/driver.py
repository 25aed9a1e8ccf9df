"""The driver actor: the lifecycle of a run. It sees sums and metrics, and no weights of the base."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import OutOfDiskError

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.messages.errors import AccessDenied, RunError
from engine.messages.events import Event, Fault, Preparing, Started, Stopped
from engine.records.checkpoint import Saved, load_checkpoint
from engine.records.logs import Logs
from engine.rounds.collectors import first_names
from engine.rounds.evaluation import Evaluation, PoolEvaluator, baselines, without_privacy
from engine.rounds.outputs import finish, write_checkpoint
from engine.rounds.planner import choose_lanes
from engine.rounds.provider_terms import ProviderProbe, stop_at_cost
from engine.rounds.recorder import Recorder
from engine.rounds.reference_columns import pays, reference_columns
from engine.rounds.round_loop import Callback, RunSetup, round_loop
from engine.rounds.server import DriverServer, RankServer, merge_into_base, with_reference
from engine.scheduling.pool import Pool
from engine.system.allocator import use_large_pages
from engine.system.atomic import write_file
from engine.system.failures import cause_of
from strategies.core.base import named


@dataclass(frozen=True)
class RunOptions:
    """Where a run reads and writes, and what it does beside the recipe's rounds."""

    store: Path
    folder: Path
    files: dict[str, bytes]  # written into the folder at the start
    shared: str | None = None  # the location elsewhere that the store is a copy of
    resume: bool = False
    baselines: bool = False
    lost: tuple[Fault, ...] = ()  # what was wrong before: why drivers have ended, and who refuses to take part
    elsewhere: str | None = None  # the URI that the folder is copied to
    notes: tuple[str, ...] = ()  # for the user, before the first round
    notice: str | None = None  # what the base's licence asks for beside the model


class Driver:
    """One run of a federation, from the first actor to the exported model."""

    def __init__(self, federation: Federation, options: RunOptions) -> None:
        use_large_pages()
        torch.set_num_threads(1)
        self.federation, self.options = federation, options
        self.stopping = False

    def stop(self) -> None:
        """Lets the present round be the last: it is finished, and its checkpoint written."""
        self.stopping = True

    def run(self) -> Iterator[Event]:
        """Yields events until the run has ended; RunError for what the user can mend."""
        try:
            with ExitStack() as at_end:
                yield from self._run(at_end)
        except OutOfDiskError as error:
            raise RunError(
                "Ray's object store is full, and so is the disk that it spills to (--temp-dir of `ray start`, or "
                "/tmp/ray): free some space there and run again with --resume: what was written before is whole"
            ) from error
        except OSError as error:  # from here, or from a slot: then it is Ray's own kind, which has lost the number
            cause = cause_of(error)
            if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"the disk that holds {self.options.folder} is full; free some space and run again with --resume: "
                f"what was written before is whole"
            ) from error

    def _run(self, at_end: ExitStack) -> Iterator[Event]:
        federation, options = self.federation, self.options

        yield Preparing("starting slots, reading the base, tokenizing rows")
        pool = Pool.start(federation, options.folder / "client_state", options.store, options.shared)
        setup = self._setup(pool)
        saved = load_checkpoint(options.folder / "checkpoints", hold=setup.server.hold) if options.resume else None
        if saved is not None:
            setup.server.refuse_other(saved.state)
        logs = Logs.under(options.folder, federation.privacy.secagg.mode, saved.wall_s if saved else 0.0)
        lanes = saved.lanes if saved else choose_lanes(federation, setup.server, setup.initial, setup.population)
        loop = round_loop(setup, logs, lanes, saved)
        if not federation.model.access.home and not federation.model.peft.plugs_in:
            loop.probe = ProviderProbe(pool, options.folder).changes
        at_end.callback(_record_last_faults, loop.recorder)
        at_end.push(partial(_note_denied, loop.recorder, named(federation.strategy)))
        self._begin_folder(pool, loop.recorder, saved)
        yield Started(
            pool.size,
            federation.clients.slots,
            training=setup.population,
            unseen=setup.store.num_clients - setup.population,
            dropped_rows=int(sum(setup.tokens.dropped(split).sum() for split in ("train", "heldout"))),
            parameters=pool.layout.size,
            base_bytes=pool.base_bytes,
            without_gpu=pool.without_gpu,
            resumed=saved.state.round if saved else None,
            lanes=lanes,
            notes=options.notes + loop.privacy.warned + (saved.passed_over if saved else ()),
        )

        evaluator = PoolEvaluator(setup, logs)
        evaluation = Evaluation(evaluator)
        # Callbacks run after each round, comparisons once the model is exported, both in this order.
        callbacks: list[Callback] = [evaluation.after_round, loop.recorder.after_round]
        checkpoint = partial(write_checkpoint, setup, loop)
        callbacks += [checkpoint, stop_at_cost(federation, logs.exposures, partial(checkpoint, stopping=True))]
        comparisons: list[Callback] = [partial(baselines, evaluator, loop)] if options.baselines else []
        if federation.evaluate.without_privacy:
            comparisons.append(partial(without_privacy, evaluator, loop))

        state = saved.state if saved else setup.initial
        merge_into_base(setup.server, None, state)
        yield from evaluation.before_rounds(state, resumed=saved is not None)
        if saved is None:
            logs.flush(state.round)
        while state.round < federation.rounds:
            state, played = loop.play(state)
            yield played
            for callback in callbacks:
                yield from callback(state)
            if self.stopping and state.round < federation.rounds:
                yield from write_checkpoint(setup, loop, state, stopping=True)
                yield Stopped(state.round)
                break
        else:
            yield from finish(evaluator, loop, state, comparisons)
        pool.stop()

    def _setup(self, pool: Pool) -> RunSetup:
        """Returns what all rounds work with; RunError if clients have nothing to train on."""
        federation, options = self.federation, self.options
        store, tokens = Store.open(options.store), Tokens.open(pool.columns.folder)
        if empty := tokens.empty_clients():
            raise RunError(
                f"{len(empty)} clients have no training row left after the cut to train.max_length = "
                f"{federation.train.max_length}, which takes their whole completions: {first_names(empty)}; "
                f"raise train.max_length, or drop small clients with data.splits.min_rows"
            )
        population = store.num_training
        federation.cohort.sample(population, federation.seed, 0)  # which raises an error if it cannot
        server = (DriverServer if pool.partition is None else RankServer)(federation, pool, population)
        initial = server.initial()
        server = with_reference(server, initial)
        if pays(federation, tokens, population):
            server = replace(server, row_column=(reference_columns(server, initial, tokens),))
        folders = options.folder, options.elsewhere
        return RunSetup(federation, pool, server, initial, store, tokens, *folders, options.notice)

    def _begin_folder(self, pool: Pool, recorder: Recorder, saved: Saved | None) -> None:
        """Writes the run folder's first files, now that model, data and resources have been found good."""
        folder = self.options.folder
        for name, content in self.options.files.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, content)
        if self.federation.keeps_state:
            (folder / "client_state").mkdir(exist_ok=True)
            pool.refuse_lost_states()
        for log in recorder.logs:
            log.forget_after(saved.state.round if saved else -1)
        recorder.faults(self.options.lost)
        recorder.logs.faults.append(recorder.round)


def _note_denied(recorder: Recorder, rule: str, kind: Any, error: BaseException | None, trace: Any) -> None:
    """Notes that the rule's clients asked the base's owner for more than it grants, if that has ended the run."""
    cause = None if error is None else cause_of(error)
    if isinstance(cause, AccessDenied):
        recorder.pool.faults.append(Fault("access", rule, str(cause)))


def _record_last_faults(recorder: Recorder) -> None:
    """Writes faults after the last round, or of a round that has ended the run."""
    recorder.faults()
    with suppress(OSError):  # the disk may be what is at fault
        recorder.logs.faults.append(recorder.round)
