"""One round after the other: cohort, local work, sums, noise, the rule; and what of it is written down."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.aggregation.privacy_account import Plan, Spending, plan_noise
from engine.aggregation.ring_encoding import rounding
from engine.aggregation.secure_clients import Authority
from engine.config.availability import Trace
from engine.config.federation import Federation
from engine.config.privacy import weights_of
from engine.messages.events import DROPOUT, Fault, RoundDone
from engine.messages.reports import Report
from engine.messages.tasks import Work
from engine.records.checkpoint import Saved
from engine.records.client_state import every_memory
from engine.records.journal import Journal
from engine.records.metrics import Logs
from engine.rounds.collectors import Collector, PlainCollector, SecureCollector, ShardCollector
from engine.rounds.secure_round import Relay
from engine.rounds.server import Server
from engine.scheduling.cost_model import Costs
from engine.scheduling.pool import Pool
from engine.training.batching import steps_of
from strategies.core.layout import Layout
from strategies.core.protocol import ServerState
from strategies.privacy.central import CentralDp, CentralPlan


class Rounds:
    """Plays rounds. What it keeps beside the strategy's state is in `saved`. `elsewhere` is as in a Journal."""

    def __init__(
        self,
        federation: Federation,
        slots: Pool,
        server: Server,
        store: Store,
        tokens: Tokens,
        layout: Layout,
        folder: Path,
        logs: Logs,
        elsewhere: str | None = None,
    ) -> None:
        self.federation, self.slots, self.server, self.layout = federation, slots, server, layout
        self.store, self.tokens = store, tokens
        self.folder, self.elsewhere = folder, elsewhere
        self.metrics, self.ledger, self.log = logs.metrics, logs.ledger, logs.faults

    def prepare(self, initial: Any, saved: Saved | None, lanes: int) -> tuple[str, ...]:
        """Plans noise and how updates come in; what the user should know of it. ValueError where it cannot be had."""
        self.lanes, self.costs = lanes, Costs.of(saved.costs if saved else [])
        federation, clients, layout = self.federation, self.store.num_training, self.layout
        dp, self.round = federation.privacy.dp, saved.state.round if saved else 0
        self.clip = saved.clip if saved else dp.clip if isinstance(dp, CentralDp) else 0.0
        self.aborts = saved.aborts if saved else 0
        self.journal = Journal.open(self.folder, self.elsewhere, saved.last_sum if saved else 0)
        rows, train = self.tokens.counts("train")[:clients], federation.train
        self.most_steps = steps_of(int(rows.max()), train)
        trainings = 1
        if isinstance(initial, ServerState):
            trainings = len(federation.strategy.starts(federation.strategy.broadcast(initial), {}))
        self.noisy_steps = self.most_steps * trainings  # a client's own, in a round: all of its trainings see its rows
        planned = plan_noise(federation, layout, clients, int(rows.min()), self.noisy_steps * federation.rounds)
        self.noise: Plan | None = planned.plan if planned else None
        simulated, spent = federation.privacy.simulated, self.folder / "privacy.json"
        weights = weights_of(federation)
        self.spending = self.noise and Spending.open(spent, self.noise, weights, simulated=simulated, round_=self.round)
        path = federation.clients.availability.trace
        trace = None if path is None else Trace.open(Path(path), self.store.names(list(range(clients))))
        self.collector: Collector = PlainCollector(federation, self.slots, trace)
        if federation.clients.zero:
            self.collector = ShardCollector(federation, self.slots, trace)
        if federation.privacy.secure:
            largest = max(2, federation.cohort.largest(clients))
            federation.privacy.secagg.parameters(largest)
            # Beside the driver: elsewhere its node's end would look like the death of each slot that asks it.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            authority = ray.remote(Authority).options(num_cpus=0, scheduling_strategy=here).remote()
            relay = Relay(self.slots, authority, federation.privacy.secagg.on_slot_death)
            most_tokens = self.most_steps * train.batch * train.accumulate * train.max_length
            self.collector = SecureCollector(federation, relay, layout, most_tokens, self.journal, self._too_few, trace)
            for round_ in range(self.round, federation.rounds):
                self._clients_clip(largest, round_)
        return planned.warned if planned else ()

    def saved(self, state: Any, wall_s: float) -> Saved:
        """All that a resumed run starts from."""
        costs, last_sum = self.costs.sums, self.journal.model
        return Saved(state, wall_s, self.clip, self.aborts, self.lanes, costs, last_sum=last_sum)

    def spent(self) -> str | None:
        """What the noise of all rounds has cost, in words."""
        return self.spending.said if self.spending else None

    def play(self, state: Any) -> tuple[Any, RoundDone]:
        """The next round's state, and what there is to tell; ValueError where it cannot go on."""
        federation, round_ = self.federation, state.round + 1
        self.round = round_
        began = time.monotonic()
        cohort = federation.cohort.sample(self.store.num_training, federation.seed, state.round)
        epsilon, clip = self.spending.charge(self.noisy_steps) if self.spending else None, self.clip
        wire = replace(self.server.broadcast(state), oldest=self._oldest(state.round), lanes=self.lanes)
        if self.noise is not None:
            wire = replace(wire, dp=self.noise, clip=self._clients_clip(len(cohort), state.round))
        steps, lengths = self.steps(cohort), self._tokens(cohort)
        done = self.collector.collect(Work(cohort, steps, self.costs.seconds(steps, lengths)), wire)
        self._learn(cohort, steps, lengths, done.reports)
        tried = [
            Fault("client", self.store.name(r.client), why)
            for r in done.reports
            for why in (*r.tried, *([r.failed] if r.failed and not r.tried else []))
        ]
        faults = self.faults(*tried)  # also of a round that ends the run
        gone = dict(zip(self.store.names([*done.gone]), done.gone.values(), strict=True))
        self.log.happened(round_, [Fault(DROPOUT, name, why) for name, why in gone.items()], self.metrics.wall_s)
        too_few = done.too_few
        if done.aborted is None:
            too_few = self._too_few(done.reports, len(cohort), round_)
        if too_few is not None:
            if federation.clients.on_too_few == "end":
                raise ValueError(f'{too_few}, or take clients.on_too_few = "skip"')
            done = replace(done, aggregate=None, aborted=too_few)
        trained = time.monotonic()
        central = self.noise if isinstance(self.noise, CentralPlan) and done.aborted is None else None
        state, self.clip = self.server.apply(state, done.aggregate, central, self.clip)
        if done.aggregate is not None:
            self.journal.model = round_
        ended = time.monotonic()
        good = [report for report in done.reports if report.good]
        if federation.remembers:
            counted = [] if done.aborted is not None else [report.client for report in good]
            self._forget(np.setdiff1d(cohort, counted), round_)
        if done.aborted is not None:
            self._abort(done.aborted, counted=too_few is None)

        failed = {self.store.name(r.client): r.why for r in done.reports if r.why is not None}
        if done.told:
            names = self.store.names([report.client for report in good])
            self.metrics.add_each(round_, "train", names, [report.metrics for report in good])
        clients = 0 if done.aborted else len(good)
        seconds, tokens = ended - began, done.figures.get("tokens", 0.0)
        self.metrics.add(round_, "train", None, loss=done.loss, tokens=tokens)
        up = sum(sent.nbytes for sent in done.messages if sent.party == "server" and sent.kind not in ("sum", "metric"))
        figures = {
            "round_s": seconds,
            "apply_s": ended - trained,
            "tokens_per_s": tokens / seconds,
            "clients": clients,
            "failed": len(failed),
            "dropped": len(gone),
            "aborted": float(done.aborted is not None),
            "protocol_bytes_down": sum(sent.nbytes for sent in done.messages if sent.party != "server"),
            "protocol_bytes_up": up,
            "store_bytes": done.store_bytes,
            "balance": self._balance(done.busy),
        }
        self.metrics.add(round_, "engine", None, **figures, faults=len(faults))
        if epsilon is not None:
            assert self.noise is not None
            z = self.noise.noise_multiplier
            self.metrics.add(round_, "privacy", None, epsilon=epsilon.epsilon, delta=epsilon.delta, noise_multiplier=z)
            self.metrics.add(round_, "privacy", None, clip=clip)
        for sent in done.messages:
            self.ledger.received(round_, sent.party, sent.kind, sent.count, sent.nbytes)
        rate = tokens / seconds
        return state, RoundDone(
            round_, done.loss, seconds, rate, clients, failed, gone, done.aborted, self.spent(), faults
        )

    def faults(self, *more: Fault) -> tuple[Fault, ...]:
        """Notes what has gone wrong since this was asked last, and returns it."""
        found = (*self.slots.faults, *more)
        self.slots.faults.clear()
        self.log.happened(self.round, found, self.metrics.wall_s)
        return found

    def _balance(self, busy: list[float]) -> float:
        """The mean over the longest of the slots' working times, without slots that there no longer are."""
        there = [seconds for slot, seconds in enumerate(busy) if seconds or slot in self.slots.alive]
        return statistics.mean(there) / max(there) if any(there) else 1.0

    def _clients_clip(self, clients: int, round_: int) -> float:
        """The norm that clients clip to: less than the server counts on by what a ring's rounding may add to it."""
        if not isinstance(self.collector, SecureCollector):
            return self.clip
        sums = self.collector.sums(self.noise, self.clip, max(1, clients), round_)
        if not isinstance(self.noise, CentralPlan):
            return self.clip
        room = self.clip - rounding(sums)
        if room < self.clip / 2:
            raise ValueError(
                f"a ring of {sums.bits} bits rounds away more than half of privacy.dp.clip = {self.clip:g} with "
                f"{clients} clients: raise privacy.secagg.bits, or lower cohort.size"
            )
        return room

    def _forget(self, clients: np.ndarray, round_: int) -> None:
        """Lets clients forget a round that they are not in the sum of: they may have ended it in a slot that died."""
        for memory in every_memory(self.folder / "memory"):
            for client in clients:
                memory.forget(int(client), round_)

    def _abort(self, why: str, *, counted: bool) -> None:
        """The model stays as it was, and the run goes on; ValueError after too many."""
        self.aborts += counted
        allowed = self.federation.privacy.secagg.max_aborts
        if self.aborts > allowed:
            raise ValueError(
                f"{self.aborts} rounds had no result, more than privacy.secagg.max_aborts = {allowed} allows, the last "
                f"so: {why}; expect more drop-outs by privacy.secagg.dropout, or take larger cohorts"
            )

    def _oldest(self, round_: int) -> int:
        """The round of the oldest checkpoint that a run could be resumed from after this one."""
        every, keep = self.federation.checkpoint.every, self.federation.checkpoint.keep
        return max(0, (round_ // every - keep) * every)

    def steps(self, clients: np.ndarray) -> np.ndarray:
        """How many steps each of the clients takes in a round."""
        return np.array([steps_of(int(rows), self.federation.train) for rows in self.tokens.counts("train")[clients]])

    def _tokens(self, clients: np.ndarray) -> np.ndarray:
        """About how many tokens each of the clients trains on in a round."""
        train = self.federation.train
        passes = -(-self.tokens.counts("train")[clients] // (train.batch * train.accumulate))
        found: np.ndarray = self.tokens.lengths()[clients] * self.steps(clients) / passes
        return found

    def _learn(self, cohort: np.ndarray, steps: np.ndarray, tokens: np.ndarray, reports: list[Report]) -> None:
        seconds = {report.client: report.seconds for report in reports if report.good}
        there = np.isin(cohort, list(seconds))
        self.costs.learn(steps[there], tokens[there], np.array([seconds[int(client)] for client in cohort[there]]))

    def _too_few(self, reports: Sequence[Report], cohort: int, round_: int) -> str | None:
        """Why a round has too few updates, and what helps; None where it has enough."""
        clients = self.federation.clients
        failed = [report for report in reports if report.failed is not None]
        if len(failed) > clients.max_failed * len(reports) or (failed and len(failed) == len(reports)):
            names = [self.store.name(report.client) for report in failed]
            return (
                f"{len(failed)} of {len(reports)} clients of round {round_} gave no usable update, more than "
                f"clients.max_failed = {clients.max_failed:g} allows: {few(names)}: {failed[0].why}; "
                f"lower train.optimizer.lr, raise clients.max_failed"
            )
        there = sum(report.good for report in reports)
        if there < clients.min_share * cohort:
            return (
                f"{there} of {cohort} clients of round {round_} gave an update, fewer than clients.min_share = "
                f"{clients.min_share:g} asks for: allow more time or lower clients.min_share"
            )
        return None


def few(names: list[str]) -> str:
    """The first names of many."""
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
