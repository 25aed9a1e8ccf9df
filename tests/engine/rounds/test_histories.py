"""Whatever dies and is played again, no two unmasked sums of one model differ by fewer clients than the recipe says."""

import os
import random
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
import torch

from engine.aggregation.accumulators import RingSum
from engine.aggregation.ring_shard import RingShard
from engine.aggregation.secure_clients import SecureClients
from engine.config.availability import LEFT_OUT
from engine.messages.broadcast import BroadcastMessage
from engine.messages.reports import DOWN, Report
from engine.messages.tasks import Work
from engine.records.journal import Journal
from engine.rounds.secure_round import Relay, SecureCollector
from engine.rounds.server import DriverServer
from engine.scheduling.dispatcher import units_of
from engine.system.failures import SlotSilent
from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import Broadcast, Update

POPULATION, ROUNDS, SHARE = 7, 6, 0.5
LAYOUT = Layout(("w",), ((POPULATION,),))
HISTORIES = 100
UNIFORM = 'strategy={kind="fedavg", weighting="uniform"}'


class DriverDied(Exception):
    """All that the driver had in memory is gone."""


@dataclass(frozen=True)
class Held:
    """A sum that the server's side has unmasked: of which round, from which model, and of whom."""

    round: int
    model: bytes
    clients: frozenset[int]


@dataclass
class Chance:
    """What goes wrong in a history, and what the server's side held."""

    seed: int
    held: list[Held] = field(default_factory=list)
    written: list[frozenset[int] | None] = field(default_factory=list)
    known: int = 0
    left_out: int = 0
    refused: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.random = random.Random(self.seed)

    def strikes(self, probability):
        return self.random.random() < probability


class Slot(SecureClients):
    """Plays its clients; one that trains gives a vector in which its own coordinate alone is not zero."""

    def __init__(self, federation, chance):
        super().__init__()
        self.federation, self.chance = federation, chance

    def masked(self, inboxes, message):
        work = self.pending(inboxes)
        if work.fresh:
            self.ring = RingSum(RingShard(work.session.sums, {}), self.federation, None, message.round)
        reports = [self.trained(client) for unit in work.units for client in unit]
        return self.answer(self.ring.masked(self.masks(reports, inboxes)))

    def trained(self, client):
        if self.chance.strikes(0.1):
            return Report(client, {DOWN: 0.0}, "it failed")
        if self.chance.strikes(0.05):  # a deadline by the clock
            return Report(client, {DOWN: 0.0}, late=1.0)
        delta = torch.zeros(POPULATION)
        delta[client] = SHARE
        self.ring.add(Update(client, 1.0, delta, {}, {"loss": 1.0, "learned": 1.0, "tokens": 1.0}))
        return Report(client, {DOWN: 0.0})


class Pool:
    """Two slots in this process."""

    size, alive, layout = 2, (0, 1), LAYOUT

    def __init__(self, federation, chance, folder):
        self.federation, self.chance, self.folder, self.faults = federation, chance, folder, []
        self.actors = [Slot(federation, chance) for _ in self.alive]

    def units(self, work, lanes):
        return units_of(work.clients, work.steps, lanes)

    def replace(self, slot, error):
        self.actors[slot] = Slot(self.federation, self.chance)

    def before_shares(self):
        """What is on disk when clients are asked for shares."""
        self.chance.written.append(Journal(self.folder, None, 0).clients(self.round))


class Whole(DriverServer):
    """The model is whole in the driver, which notes what it unmasks."""

    def unmasked(self, masked, plan):
        unmasked, pool = super().unmasked(masked, plan), self.pool
        count, _, (aggregate,), _ = unmasked
        clients = np.flatnonzero(np.rint(aggregate.total.numpy() / SHARE))
        assert len(clients) == count
        pool.chance.known += pool.chance.written[-1] == frozenset(clients.tolist())
        pool.chance.held.append(Held(pool.round, pool.model, frozenset(clients.tolist())))
        if pool.chance.strikes(0.05):
            raise DriverDied
        return unmasked


class HereRelay(Relay):
    """Slots are asked in this process; any may die of it, and so may the driver."""

    def _call(self, slot, name, *arguments):
        pool = self.server.pool
        chance = pool.chance
        if name == "unmask":
            pool.before_shares()
        if chance.strikes(0.01):
            raise DriverDied
        if chance.strikes(0.02):
            return SlotSilent("gone")
        return getattr(pool.actors[slot], name)(*arguments)

    def _answer(self, reference):
        if isinstance(reference, SlotSilent):
            raise reference
        return reference


class NoJournal(Journal):
    """What a run without one would be."""

    def clients(self, round_):
        return None

    def admit(self, round_, clients, refuse_thin):
        pass


def half_failed(reports, cohort, round_):
    return "too few" if sum(report.failed is not None for report in reports) > cohort / 2 else None


def play(federation, folder, seed, kind):
    """A run until it has played all rounds: drivers die, and others go on from the last checkpoint."""
    chance = Chance(seed)
    every, cohorts = chance.random.randint(1, 4), UniformCohort(size=chance.random.choice([5, POPULATION]))
    death = chance.random.choice(["void", "dropout"])
    saved = (0, b"initial", 0)
    while saved[0] < ROUNDS:
        round_, model, last_sum = saved
        journal, pool = kind(folder, None, last_sum), Pool(federation, chance, folder)
        relay = HereRelay(Whole(federation, pool, POPULATION), None, death)
        collector = SecureCollector(federation, relay, 1000, journal, half_failed)
        try:
            while round_ < ROUNDS:
                pool.round, pool.model = round_ + 1, model
                cohort = cohorts.sample(POPULATION, federation.seed, round_)
                costs = np.ones(len(cohort))
                message = BroadcastMessage.of(Broadcast(round_, torch.zeros(POPULATION)))
                collected = collector.collect(Work(cohort, costs.astype(int), costs), message)
                round_ += 1
                chance.left_out += LEFT_OUT in collected.gone.values()
                for aggregate in collected.sums:
                    model = sha256(model + bytes([round_]) + aggregate.total.numpy().tobytes()).digest()
                    journal.summed(round_)
                if chance.strikes(0.15):
                    raise DriverDied
                if round_ % every == 0 or round_ == ROUNDS:
                    saved = (round_, model, journal.model)
                if chance.strikes(0.05):
                    raise DriverDied
        except DriverDied:
            files = sorted(folder.glob("unmasked/*.json"))
            if files and chance.strikes(0.05):
                chance.random.choice(files).write_bytes(b"{}")
        chance.refused += [fault.why for fault in pool.faults]
    return chance


def too_close(chance, least):
    """Pairs of sums of one model, or of one round, that differ by fewer than `least` clients."""
    return [
        (a, b)
        for a, b in combinations(chance.held, 2)
        if (a.model == b.model and 0 < len(a.clients ^ b.clients) < least)
        or (a.round == b.round and a.clients != b.clients)
    ]


@pytest.fixture
def histories(small_recipe, tmp_path, monkeypatch):
    """Plays many histories with a kind of journal; gives what each has seen, with its `min_contributors`."""

    monkeypatch.setattr(os, "fsync", lambda file: None)  # no machine loses its power here

    def play_all(kind, mode, count):
        for seed in range(count):
            least = 2 + seed % 2
            secagg = f"privacy.secagg={{mode='{mode}', threshold=2, dropout=0.3, min_contributors={least}}}"
            away = f"clients.availability.dropout={0.1 if seed % 3 == 0 else 0.0}"
            folder = tmp_path / f"{kind.__name__}-{mode}-{seed}"
            yield play(small_recipe(f"seed={seed}", UNIFORM, secagg, away), folder, seed, kind), least

    return play_all


@pytest.mark.parametrize(("mode", "count"), [("ideal", HISTORIES), ("full", 10)])
def test_no_two_sums_of_one_model_are_nearly_of_the_same_clients(histories, mode, count, full):
    count = 10 * count if full else count
    played = list(histories(Journal, mode, count))
    assert [pair for chance, least in played for pair in too_close(chance, least)] == []
    assert sum(len(chance.held) for chance, _ in played) > 3 * count
    assert all(chance.known == len(chance.held) for chance, _ in played)  # on disk before anybody was asked for shares
    if mode == "ideal":  # all that the journal is for has come to pass
        assert sum(chance.left_out for chance, _ in played) > 10
        reasons = " ".join(why for chance, _ in played for why in chance.refused)
        assert "who is there now" in reasons and "from the same model" in reasons and "cannot be read" in reasons


def test_a_round_with_too_few_updates_leaves_the_model_and_has_no_sum(small_recipe, tmp_path):
    """Its sum would stand beside the next one's, from the same model."""
    federation, chance = small_recipe(UNIFORM, "privacy.secagg={mode='full', threshold=2}"), Chance(1)
    pool, journal = Pool(federation, chance, tmp_path), Journal(tmp_path, None, 0)
    relay, cohort = HereRelay(Whole(federation, pool, POPULATION), None, "void"), np.arange(5)
    collector = SecureCollector(federation, relay, 1000, journal, lambda *_: "all are too few")
    message = BroadcastMessage.of(Broadcast(0, torch.zeros(POPULATION)))
    collected = collector.collect(Work(cohort, np.ones(5, int), np.ones(5)), message)
    assert collected.sums == [] and collected.too_few == "all are too few" and collected.too_few in collected.aborted
    assert chance.held == [] and not (journal.run / "unmasked").exists()


def test_without_a_journal_there_are_such_sums(histories):
    assert any(too_close(chance, least) for chance, least in histories(NoJournal, "ideal", 20))
