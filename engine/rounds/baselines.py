"""What a federation is compared with at its end: training without it, and the same rounds without privacy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from engine.config.privacy import Privacy
from engine.messages.broadcast import BroadcastMessage, share
from engine.messages.events import Evaluated, Event
from engine.messages.shards import ShardedState, borrow
from engine.records.metrics import Logs
from engine.rounds.assembly import RunParts, round_loop
from engine.rounds.evaluation import PoolEvaluator
from engine.rounds.round_loop import RoundLoop
from engine.rounds.server import move_base
from strategies.core.protocol import Broadcast


@dataclass(frozen=True)
class Baselines:
    """Spends the federation's steps on one pooled model, and in equal parts on each client's own.

    Every round has an equal part of a model's steps, with the learning rates of `train.over_rounds` and `over_steps`.
    """

    parts: RunParts
    evaluator: PoolEvaluator
    loop: RoundLoop

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Trains and evaluates both baselines after the last round."""
        if state.round < self.parts.federation.rounds:
            return
        parts, shards, clients, evaluator = self.parts, self.parts.shards, self.parts.population, self.evaluator
        move_base(shards, state, None)
        total = self.loop.planner.total_steps()
        # The remainder goes to some clients, one step each; if there are fewer steps than clients, all take one.
        steps = np.maximum(1, total // clients + (np.arange(clients) < total % clients))
        start = shards.vector(parts.initial)
        yield Evaluated(state.round, evaluator.local_only(start, state.round, steps, "local_only"), "local_only")
        everybody = list(range(clients))
        trained_P = parts.pool.ask(lambda actor: actor.centralized.remote(everybody, start, total), long=True)
        pooled = share(BroadcastMessage.of(Broadcast(state.round, borrow(trained_P))))
        yield Evaluated(state.round, evaluator.losses(pooled, state.round, "loss_centralized"), "centralized")
        move_base(shards, None, state)


@dataclass(frozen=True)
class WithoutPrivacy:
    """Shows what privacy costs: plays the rounds again without noise and without secure aggregation."""

    parts: RunParts
    evaluator: PoolEvaluator
    loop: RoundLoop

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Plays and evaluates the other run after the last round; nothing of it is written but faults and losses."""
        if state.round < self.parts.federation.rounds:
            return
        federation, shards, recorder = self.parts.federation, self.parts.shards, self.loop.recorder
        evaluate = replace(federation.evaluate, without_privacy=False)
        parts = replace(self.parts, federation=replace(federation, privacy=Privacy(), evaluate=evaluate))
        loop = round_loop(parts, Logs.under(parts.folder), self.loop.lanes)  # these logs are never flushed
        move_base(shards, state, None)
        plain = parts.initial
        while plain.round < federation.rounds:
            plain, played = loop.play(plain)
            recorder.logs.faults.happened(state.round, played.faults, recorder.logs.metrics.wall_s)
        losses = self.evaluator.losses(shards.vector(plain), state.round, "loss_not_private")
        move_base(shards, plain, state)
        yield Evaluated(state.round, losses, "not_private")
