"""What a federation is compared with at its end: training without it, and the same rounds without privacy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from engine.config.privacy import Privacy
from engine.messages.events import Evaluated, Event
from engine.messages.shards import ShardedState
from engine.records.metrics import Logs
from engine.rounds.assembly import RunParts, round_loop
from engine.rounds.evaluation import Evaluator
from engine.rounds.round_loop import RoundLoop


@dataclass(frozen=True)
class Baselines:
    """Spends the federation's steps on one pooled model, and in equal parts on each client's own."""

    parts: RunParts
    evaluator: Evaluator
    loop: RoundLoop

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Trains and evaluates both baselines after the last round."""
        if state.round < self.parts.federation.rounds:
            return
        server, clients, evaluator = self.parts.server, self.parts.population, self.evaluator
        server.move_base(state, None)
        total = self.loop.planner.total_steps()
        # The remainder goes to some clients, one step each; if there are fewer steps than clients, all take one.
        steps = np.maximum(1, total // clients + (np.arange(clients) < total % clients))
        start = server.vector(self.parts.initial)
        yield Evaluated(state.round, evaluator.local_only(start, state.round, steps, "local_only"), "local_only")
        yield Evaluated(state.round, evaluator.centralized(start, state.round, total), "centralized")
        server.move_base(None, state)


@dataclass(frozen=True)
class WithoutPrivacy:
    """Shows what privacy costs: plays the rounds again without noise and without secure aggregation."""

    parts: RunParts
    evaluator: Evaluator
    loop: RoundLoop

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Plays and evaluates the other run after the last round; nothing of it is written but faults and losses."""
        if state.round < self.parts.federation.rounds:
            return
        federation, server, recorder = self.parts.federation, self.parts.server, self.loop.recorder
        evaluate = replace(federation.evaluate, without_privacy=False)
        parts = replace(self.parts, federation=replace(federation, privacy=Privacy(), evaluate=evaluate))
        logs = Logs.under(parts.folder)
        loop = round_loop(parts, logs, self.loop.lanes)
        server.move_base(state, None)
        plain = parts.initial
        while plain.round < federation.rounds:
            plain, played = loop.play(plain)
            logs.clear()
            recorder.logs.faults.happened(state.round, played.faults, recorder.logs.metrics.wall_s)
        losses = self.evaluator.not_private(server.vector(plain), state.round)
        server.move_base(plain, state)
        yield Evaluated(state.round, losses, "not_private")
