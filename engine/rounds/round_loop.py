"""One round after another, on one page: plan, dispatch, collect, decode, apply, record."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.aggregation.privacy_account import PrivacyAccount
from engine.config.availability import Trace
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.errors import RunError
from engine.messages.events import Event, Fault, RoundDone
from engine.messages.shards import ShardedState
from engine.messages.tasks import Work
from engine.records.checkpoint import Saved
from engine.records.client_state import forget_round
from engine.records.journal import Journal
from engine.records.logs import Logs
from engine.rounds.collectors import ClearCollector, Collected, shortfall
from engine.rounds.planner import Costs, Planner
from engine.rounds.recorder import Recorder
from engine.rounds.secure_round import SecureCollector, Shortfall, start_relay
from engine.rounds.server import Server, apply
from engine.scheduling.pool import Pool

Collector = ClearCollector | SecureCollector
Callback = Callable[[ShardedState], Iterator[Event]]  # what a run does after each round: see driver.py


@dataclass
class RoundLoop:
    """Plays the rounds of a federation. `aborts` counts rounds of secure aggregation without a result."""

    federation: Federation
    planner: Planner
    server: Server
    collector: Collector
    shortfall: Shortfall
    privacy: PrivacyAccount
    journal: Journal
    recorder: Recorder
    client_states: Path
    lanes: int = 1
    aborts: int = 0
    probe: Callable[[int], tuple[Fault, ...]] = lambda round_: ()  # what has changed elsewhere

    def play(self, state: ShardedState) -> tuple[ShardedState, RoundDone]:
        """Plays the next round: returns the state after it and what to show; RunError if the run cannot continue."""
        began, round_ = time.monotonic(), state.round + 1
        self.recorder.begin(round_)

        # Plan: who trains, within which norm and with which noise.
        work = self.planner.work(state.round)
        clip, privacy = self.privacy.clip, self.privacy.charge()
        message = self._round_message(state, work)

        # Dispatch the work and collect what the server may learn of it.
        collected = self.collector.collect(work, message)
        self.planner.learn(work, collected.reports)
        faults = self.recorder.collected(collected, self.probe(round_))
        self._abort_if_too_few(collected, len(work.clients), round_)

        # Decode the sums (noise, then the clients' transforms in reverse) and apply the rule to them.
        applying = time.monotonic()
        noise = None if collected.aborted is not None else self.privacy.central
        state, self.privacy.clip = apply(self.server, state, collected.sums, noise, clip)
        if collected.sums:
            self.journal.summed(round_)
        times = {"round_s": time.monotonic() - began, "apply_s": time.monotonic() - applying}
        self._settle(work, collected, round_)

        # Record it.
        return state, self.recorder.played(collected, faults, times, privacy, self.privacy.statement)

    def saved(self, state: ShardedState) -> Saved:
        """Returns all that a resumed run starts from."""
        wall_s, costs = self.recorder.logs.metrics.wall_s, self.planner.costs.sums.tolist()
        return Saved(state, wall_s, self.privacy.clip, self.aborts, self.lanes, costs, last_sum=self.journal.model)

    def _round_message(self, state: ShardedState, work: Work) -> BroadcastMessage:
        plan, oldest = self.privacy.noise_plan, self.planner.oldest(state.round)
        clients, lanes, full_rows = len(work.clients), self.lanes, self.planner.full_rows(work.clients)
        clip = 0.0 if plan is None else self.collector.client_clip(plan, self.privacy.clip, clients, state.round)
        message = self.server.broadcast_message(state)
        return replace(message, oldest=oldest, lanes=lanes, noise_plan=plan, clip=clip, full_rows=full_rows)

    def _abort_if_too_few(self, collected: Collected, cohort: int, round_: int) -> None:
        """Takes the sums out of a round in which too few clients gave an update; RunError if that ends the run."""
        if collected.aborted is None:
            collected.too_few = self.shortfall(collected.reports, cohort, round_)
        if collected.too_few is not None:
            if self.federation.clients.on_too_few == "end":
                raise RunError(f'{collected.too_few}, or take clients.on_too_few = "skip"')
            collected.sums, collected.aborted = [], collected.too_few

    def _settle(self, work: Work, collected: Collected, round_: int) -> None:
        """Removes the states of clients that are not in the sum, and counts a round without a result."""
        if self.federation.keeps_state:  # a client may have written its state in a slot that died
            counted = [] if collected.aborted is not None else [report.client for report in collected.good]
            forget_round(self.client_states, np.setdiff1d(work.clients, counted).tolist(), round_)
        # Too few clients is no abort of secure aggregation.
        if collected.aborted is None or collected.too_few is not None:
            return
        self.aborts += 1
        allowed = self.federation.privacy.secagg.max_aborts
        if self.aborts > allowed:
            raise RunError(
                f"{self.aborts} rounds had no result, more than privacy.secagg.max_aborts = {allowed} allows, the last "
                f"because: {collected.aborted}; expect more drop-outs by privacy.secagg.dropout, or take larger cohorts"
            )


@dataclass(frozen=True)
class RunSetup:
    """What all rounds of a run work with."""

    federation: Federation
    pool: Pool
    server: Server
    initial: ShardedState  # before the first round
    store: Store
    tokens: Tokens
    folder: Path
    elsewhere: str | None = None  # the URI that the folder is copied to
    notice: str | None = None  # what the base's licence asks for beside the model

    @property
    def population(self) -> int:
        """How many clients may train."""
        return self.store.num_training


def round_loop(setup: RunSetup, logs: Logs, lanes: int = 1, saved: Saved | None = None) -> RoundLoop:
    """Returns the loop of a run's rounds, from the start or from what was `saved`; ValueError if it cannot be."""
    federation, store, server = setup.federation, setup.store, setup.server
    costs = Costs(np.array(saved.costs)) if saved and saved.costs else Costs()
    planner = Planner(federation, setup.tokens, setup.population, costs)
    begun = (saved.state.round, saved.clip, saved.aborts, saved.last_sum) if saved else (0, None, 0, 0)
    round_, clip, aborts, last_sum = begun
    rows, unit = setup.tokens.counts("train")[: setup.population], store.manifest.get("unit")
    steps = planner.most_steps() * server.trainings(setup.initial)  # all trainings of a client see its rows
    privacy = PrivacyAccount.open(federation, setup.pool.layout, setup.folder, rows, steps, round_, clip, unit)
    journal = Journal(setup.folder, setup.elsewhere, last_sum)
    too_few = partial(shortfall, federation, store)
    path = federation.clients.availability.trace
    trace = None if path is None else Trace.open(Path(path), store.names(list(range(store.num_clients))))
    collector: Collector = ClearCollector(federation, server, trace)
    if federation.privacy.secure:
        train = federation.train
        most_tokens = planner.most_steps() * train.batch * train.accumulate * train.max_length
        most_tokens *= train.objective.sequences
        relay = start_relay(server, federation.privacy.secagg.on_slot_death)
        collector = SecureCollector(federation, relay, most_tokens, journal, too_few, trace)
        largest = federation.cohort.largest(setup.population)
        collector.refuse_small_ring(privacy.noise_plan, privacy.clip, largest, round_)
    recorder, states = Recorder(store, setup.pool, logs, round_), setup.folder / "client_state"
    return RoundLoop(federation, planner, server, collector, too_few, privacy, journal, recorder, states, lanes, aborts)
