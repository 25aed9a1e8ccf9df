"""The round loop and what hangs on it, with hand-computed rounds: the clients' work is given, nothing runs on Ray."""

from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.aggregation.privacy_account import PrivacyAccount
from engine.config.federation import Federation
from engine.config.privacy import Privacy, SecAgg
from engine.config.sections import Checkpoint, Clients, Model
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.messages.events import Checkpointed, Fault
from engine.messages.reports import DOWN, UP, Report
from engine.messages.shards import Shard, ShardedState
from engine.objectives.reinforcement.grpo import Grpo
from engine.objectives.reinforcement.rewards import Balance
from engine.records.checkpoint import load_checkpoint
from engine.records.client_state import ClientStates
from engine.records.journal import Journal
from engine.records.logs import Logs
from engine.records.metrics import read_log
from engine.rounds.collectors import Collected, Message, shortfall
from engine.rounds.outputs import write_checkpoint
from engine.rounds.planner import Planner
from engine.rounds.recorder import Recorder
from engine.rounds.round_loop import RoundLoop
from engine.rounds.server import DriverServer, merge_into_base
from strategies.averaging.drift import Scaffold
from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState

LAYOUT, POPULATION, COHORT = Layout(("w",), ((2,),)), 4, 3
ROWS = np.array([4, 8, 6, 2])
AGGREGATE = Aggregate(0.5, torch.tensor([0.5, -1.0]), {}, 2)


@dataclass
class Store:
    """Names clients."""

    num_training: int = POPULATION

    def names(self, clients):
        return [f"client-{client}" for client in clients]

    def name(self, client):
        return f"client-{client}"


@dataclass
class Given:
    """Collects what it is given."""

    collected: list[Collected]
    messages: list = field(default_factory=list)

    def collect(self, work, message):
        self.messages.append(message)
        return self.collected.pop(0)


@dataclass
class Bases:
    """A pool that knows which deltas were merged into its base."""

    layout: Layout = LAYOUT
    initial: np.ndarray = field(default_factory=lambda: np.array([1.0, 2.0], np.float32))
    merged: list = field(default_factory=list)
    faults: list = field(default_factory=list)
    alive: tuple = (0, 1)

    def merge_into_base(self, merged_delta):
        self.merged.append(merged_delta)


def report(client, **changes):
    metrics = {"loss": 2.0, "learned": 10.0, "tokens": 12.0, DOWN: 8.0, UP: 8.0}
    return Report(client, metrics, seconds=1.0, **changes)


def recipe(**sections):
    sections = {"cohort": UniformCohort(size=COHORT), "train": Train(steps=1, batch=2), **sections}
    return Federation(name="x", seed=1, rounds=4, model=Model(), **sections)


def loop_of(federation, folder, *collected):
    """A loop whose clients' work is given."""
    pool, store = Bases(), Store()
    tokens = SimpleNamespace(counts=lambda split: ROWS, lengths=lambda: 10 * ROWS)
    return RoundLoop(
        federation,
        Planner(federation, tokens, POPULATION),
        DriverServer(federation, pool, POPULATION),
        Given(list(collected)),
        partial(shortfall, federation, store),
        PrivacyAccount(federation, folder / "privacy.json"),
        Journal(folder, None, 0),
        Recorder(store, pool, Logs.under(folder)),
        folder / "client_state",
    )


def good_round():
    reports, messages = [report(0), report(2)], [Message("client", "sum", 2, 16), Message("server", "update", 2, 16)]
    metrics = {"loss": 2.0, "tokens": 24.0}
    return Collected(reports, [AGGREGATE], metrics, messages, {3: "asleep"}, busy=[1.0, 3.0])


def params(state):
    (shard,) = state.shards
    return shard.params.tolist()


def test_a_round_by_hand(tmp_path):
    """FedAvg: 1 + 0.5 / 0.5 and 2 - 1 / 0.5."""
    loop = loop_of(recipe(), tmp_path, good_round())
    loop.recorder.pool.faults.append(Fault("slot", "1", "killed"))
    state, played = loop.play(loop.server.initial())
    assert (state.round, params(state), loop.journal.model) == (1, [2.0, 0.0], 1)
    (message,) = loop.collector.messages
    rows = ROWS[loop.planner.work(0).clients].max()
    assert ROWS.max() == 8 and 1 / 2 < rows / message.full_rows <= 1
    assert message.vector().tolist() == [1.0, 2.0] and message.round == 0
    assert (played.round, played.loss, played.clients) == (1, 2.0, 2)
    assert (played.gone, played.faults) == ({"client-3": "asleep"}, (Fault("slot", "1", "killed"),))
    loop.recorder.logs.flush(1)
    rows = read_log(tmp_path / "metrics").to_pylist()
    figures = {(row["split"], row["client"], row["name"]): row["value"] for row in rows}
    assert figures["train", None, "loss"] == 2.0 and figures["train", "client-2", "loss"] == 2.0
    engine = {name: value for (split, _, name), value in figures.items() if split == "engine"}
    expected = {"clients": 2, "failed": 0, "dropped": 1, "aborted": 0, "balance": 2 / 3, "faults": 1}
    expected |= {"protocol_bytes_down": 16, "protocol_bytes_up": 16}
    assert engine.items() >= expected.items()
    ledger = read_log(tmp_path / "ledger").select(["party", "kind", "count", "bytes"]).to_pylist()
    assert [tuple(row.values()) for row in ledger] == [("client", "sum", 2, 16), ("server", "update", 2, 16)]
    faults = read_log(tmp_path / "faults").select(["kind", "who", "why"]).to_pylist()
    assert [tuple(row.values()) for row in faults] == [("slot", "1", "killed"), ("dropout", "client-3", "asleep")]


def test_the_share_that_secure_aggregation_clips_is_a_metric(tmp_path):
    loop = loop_of(recipe(), tmp_path, replace(good_round(), clipped=0.25), good_round())
    state, _ = loop.play(loop.server.initial())
    loop.play(state)
    loop.recorder.logs.flush(1)
    rows = read_log(tmp_path / "metrics").to_pylist()
    assert [(row["round"], row["value"]) for row in rows if row["name"] == "clipped"] == [(1, 0.25)]


def test_without_sums_the_model_stays_as_it_was_and_too_many_such_rounds_end_the_run(tmp_path):
    federation = recipe(privacy=Privacy(secagg=SecAgg(max_aborts=1)))
    aborted = Collected(by_client=False, aborted="nobody is left")
    loop = loop_of(federation, tmp_path, Collected(), aborted, aborted)
    state, _ = loop.play(loop.server.initial())
    state, played = loop.play(state)
    assert (state.round, params(state), loop.journal.model, loop.aborts) == (2, [1.0, 2.0], 0, 1)
    assert (played.aborted, played.clients) == ("nobody is left", 0)
    with pytest.raises(
        RunError, match=r"2 rounds had no result, more than .* = 1 allows, the last because: nobody is left"
    ):
        loop.play(state)


def test_a_round_with_too_few_updates_ends_the_run_or_is_skipped(tmp_path):
    failed = replace(good_round(), reports=[report(0), report(1, failed="NaN"), report(2, failed="NaN")])
    loop = loop_of(recipe(), tmp_path, failed)
    with pytest.raises(RunError, match=r"2 of 3 clients of round 1 gave no usable update.*'client-1', 'client-2': NaN"):
        loop.play(loop.server.initial())
    loop.recorder.logs.faults.flush(1)  # as when a run ends
    assert read_log(tmp_path / "faults")["who"].to_pylist() == ["client-1", "client-2", "client-3"]
    loop = loop_of(recipe(clients=Clients(on_too_few="skip")), tmp_path, failed)
    state, played = loop.play(loop.server.initial())
    assert (state.round, params(state), loop.aborts) == (1, [1.0, 2.0], 0)
    assert "2 of 3 clients" in played.aborted and played.failed == {"client-1": "NaN", "client-2": "NaN"}


def test_the_quorum_is_a_share_of_the_cohort():
    judge = partial(shortfall, recipe(clients=Clients(min_share=0.5)), Store())
    assert judge([report(0), report(1)], 4, 1) is None
    assert judge([report(0), report(1, late=2.0)], 4, 1).startswith("1 of 4 clients of round 1 gave an")


def test_clients_that_are_not_in_the_sum_lose_the_state_of_the_round(tmp_path):
    federation = recipe(strategy=Scaffold(), train=Train(steps=1, batch=2, optimizer=Sgd(lr=0.1)))
    cohort, states = federation.cohort.sample(POPULATION, 1, 1).tolist(), ClientStates(tmp_path / "client_state")
    for client in cohort:
        for round_ in (1, 2):
            states.write(client, round_, {"c": torch.full((1,), float(round_))}, oldest=0)
    sums = [Aggregate(1.0, torch.zeros(2), {"c": torch.zeros(2)}, 1)]
    loop = loop_of(federation, tmp_path, Collected([report(cohort[0]), report(cohort[1], late=1.0)], sums))
    state, _ = loop.play(replace(loop.server.initial(), round=1))
    assert state.round == 2
    assert [states.read(client, 2)["c"].item() for client in cohort] == [2.0, 1.0, 1.0]


def test_the_base_follows_what_a_state_has_merged_and_only_that():
    server = DriverServer(recipe(), Bases(), POPULATION)
    plain, merged = (
        ShardedState(0, (server.hold(ServerState(0, torch.zeros(2), merged_delta=delta)),))
        for delta in (None, torch.ones(3))
    )
    for before, after in ((None, plain), (plain, plain), (None, merged), (merged, merged), (merged, None)):
        merge_into_base(server, before, after)
    first, second = server.pool.merged
    assert first.tolist() == [1, 1, 1] and second is None


def test_a_checkpoint_of_another_model_is_refused():
    server = DriverServer(recipe(), Bases(), POPULATION)
    server.refuse_other(ShardedState(3, (Shard(np.zeros(2), {}),)))
    for lengths in ((3,), (1, 1)):
        state = ShardedState(3, tuple(Shard(np.zeros(length), {}) for length in lengths))
        with pytest.raises(RunError, match="the recipe's model has 2: resume"):
            server.refuse_other(state)


def test_checkpoints_are_written_in_their_turn_and_when_the_run_stops_but_once(tmp_path):
    federation = recipe(checkpoint=Checkpoint(every=2, keep=9))
    loop = loop_of(federation, tmp_path)
    setup = SimpleNamespace(federation=federation, folder=tmp_path, server=loop.server)
    events = []
    for round_ in (1, 2, 3):
        state = replace(loop.server.initial(), round=round_)
        events += [*write_checkpoint(setup, loop, state)]
        if round_ > 1:
            events += [*write_checkpoint(setup, loop, state, stopping=True)]
    assert events == [Checkpointed(2), Checkpointed(3)]
    assert load_checkpoint(tmp_path / "checkpoints").state.round == 3


def test_plans_by_hand(tmp_path):
    """Two rows a step: 2, 4, 3 and 1 passes, of one step each in a round."""
    planner = Planner(recipe(checkpoint=Checkpoint(every=2, keep=2)), loop_of(recipe(), tmp_path).planner.tokens, 4)
    work = planner.work(0)
    assert len({*work.clients.tolist()} & {0, 1, 2, 3}) == COHORT
    assert work.steps.tolist() == [1, 1, 1] and planner.most_steps() == 1 and planner.total_steps() == 4 * COHORT
    assert [planner.oldest(round_) for round_ in range(9)] == [0, 0, 0, 0, 0, 0, 2, 2, 4]
    # Nothing is known yet: a token is a millisecond. A client has 10 tokens a row, and goes through 2 rows a round.
    assert work.costs.tolist() == pytest.approx([0.02] * 3)
    seconds = [3.0, 3.0, 0.5]
    reports = [replace(report(c), seconds=s) for c, s in zip(work.clients.tolist(), seconds, strict=True)]
    planner.learn(work, [*reports[:2], replace(reports[2], failed="NaN")])
    assert planner.work(0).costs.tolist() == pytest.approx([3.0] * 3)


def test_plans_count_the_tokens_that_are_generated(tmp_path):
    """Two prompts a step of 10 tokens each, and 4 samples of each with up to 7 more."""
    objective = Grpo(rewards=(Balance(),), num_generations=4, max_completion_length=7)
    federation = recipe(train=Train(steps=1, batch=2, objective=objective))
    planner = Planner(federation, loop_of(recipe(), tmp_path).planner.tokens, POPULATION)
    assert planner.work(0).costs.tolist() == pytest.approx([4 * 2 * (10 + 7) / 1000] * 3)
