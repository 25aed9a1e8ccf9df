"""One round after another, on one page: plan, dispatch, collect, decode, apply, record."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.aggregation.privacy_account import PrivacyAccount
from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.messages.events import RoundDone
from engine.messages.shards import ShardedState
from engine.messages.tasks import Work
from engine.records.checkpoint import Saved
from engine.records.client_state import forget_round
from engine.records.journal import Journal
from engine.rounds.collectors import Collected, Collector, Quorum
from engine.rounds.planner import Planner
from engine.rounds.recorder import Played, Recorder
from engine.rounds.server import Server


@dataclass
class RoundLoop:
    """Plays the rounds of a federation. `aborts` counts rounds of secure aggregation without a result.

    assembly.py puts its parts together. What it keeps from round to round beside the model is in `saved`.
    """

    federation: Federation
    planner: Planner
    server: Server
    collector: Collector
    quorum: Quorum
    privacy: PrivacyAccount
    journal: Journal
    recorder: Recorder
    client_states: Path
    lanes: int = 1
    aborts: int = 0

    def play(self, state: ShardedState) -> tuple[ShardedState, RoundDone]:
        """Plays the next round: returns the state after it and what to show; RunError if the run cannot continue."""
        began, round_ = time.monotonic(), state.round + 1
        self.recorder.round = round_

        # Plan: who trains, on which version of the model, within which norm and with which noise.
        work = self.planner.work(state.round)
        clip, privacy = self.privacy.clip, self.privacy.charge()
        broadcast = self._broadcast(state, work)

        # Dispatch the work and collect what the server may learn of it.
        collected = self.collector.collect(work, broadcast)
        self.planner.learn(work, collected.reports)
        faults = self.recorder.collected(collected)
        collected = self._counted(collected, len(work.clients), round_)

        # Decode the sums (noise, then the clients' transforms in reverse) and apply the rule to them.
        applying = time.monotonic()
        noise = None if collected.aborted is not None else self.privacy.central
        state, self.privacy.clip = self.server.apply(state, collected.sums, noise, clip)
        if collected.sums:
            self.journal.model = round_
        ended = time.monotonic()
        self._settle(work, collected, round_)

        # Record it.
        statement = self.privacy.statement
        played = Played(round_, collected, faults, ended - began, ended - applying, privacy, statement)
        return state, self.recorder.played(played)

    def saved(self, state: ShardedState) -> Saved:
        """Returns all that a resumed run starts from."""
        wall_s, costs = self.recorder.logs.metrics.wall_s, self.planner.costs.sums
        return Saved(state, wall_s, self.privacy.clip, self.aborts, self.lanes, costs, last_sum=self.journal.model)

    def _broadcast(self, state: ShardedState, work: Work) -> Any:
        """What the cohort starts from, and the terms on which it trains."""
        plan, clip = self.privacy.plan, 0.0
        if plan is not None:
            clip = self.collector.client_clip(plan, self.privacy.clip, len(work.clients), state.round)
        oldest, full_rows = self.planner.oldest(state.round), self.planner.full_rows(work.clients)
        broadcast = self.server.broadcast(state)
        return replace(broadcast, oldest=oldest, lanes=self.lanes, dp=plan, clip=clip, full_rows=full_rows)

    def _counted(self, collected: Collected, cohort: int, round_: int) -> Collected:
        """The same, aborted if too few clients gave an update; RunError if that is to end the run."""
        too_few = collected.too_few
        if collected.aborted is None:
            too_few = self.quorum.shortfall(collected.reports, cohort, round_)
        if too_few is None:
            return collected
        if self.federation.clients.on_too_few == "end":
            raise RunError(f'{too_few}, or take clients.on_too_few = "skip"')
        return replace(collected, sums=[], aborted=too_few, too_few=too_few)

    def _settle(self, work: Work, collected: Collected, round_: int) -> None:
        """Removes the states of clients that are not in the sum, and counts a round without a result."""
        if self.federation.keeps_state:  # a client may have written its state in a slot that died
            counted = [] if collected.aborted is not None else [report.client for report in collected.good]
            forget_round(self.client_states, np.setdiff1d(work.clients, counted).tolist(), round_)
        if collected.aborted is None or collected.too_few is not None:
            return
        self.aborts += 1
        allowed = self.federation.privacy.secagg.max_aborts
        if self.aborts > allowed:
            raise RunError(
                f"{self.aborts} rounds had no result, more than privacy.secagg.max_aborts = {allowed} allows, the last "
                f"so: {collected.aborted}; expect more drop-outs by privacy.secagg.dropout, or take larger cohorts"
            )
