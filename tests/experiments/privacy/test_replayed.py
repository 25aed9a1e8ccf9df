"""A driver dies before its checkpoint: a secured round that is played again has the sum that it had, or none."""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray.cloudpickle

import experiments
from datasets_partition.sources import location
from engine.config.availability import LEFT_OUT
from engine.messages.events import DriverLost, RoundDone
from engine.records.metrics import read_log
from strategies.averaging.fedavg import FedAvg

SECURED = "privacy={rows_cap=1, secagg={mode='full', dropout=0.34, threshold=2}}"
SMALL = ("cohort.size=8", "rounds=4", "checkpoint.every=4", "evaluate.every=0", "clients.max_failed=0.5", SECURED)
FIRST, SECOND = 2, 5  # who fails in round 1 of the first play, and in round 2 of the second


@dataclass(frozen=True)
class Dying(FedAvg):
    """FedAvg that keeps each sum it is given, and whose driver dies, once, with the sum of round 3."""

    folder: str = ""

    def finish(self, update, broadcast, memory, ends):
        """As FedAvg's, but for the two that fail."""
        died = (Path(self.folder) / "died").exists()
        if (update.client, broadcast.round, died) in {(FIRST, 0, False), (SECOND, 1, True)}:
            raise ArithmeticError("its rows add up to nothing")
        return super().finish(update, broadcast, memory, ends)

    def apply(self, state, aggregate):
        """As FedAvg's, if the driver lives; the run's copy knows of the sum by then."""
        assert (Path(self.folder) / "there" / "unmasked" / f"round-{state.round + 1:05d}.json").exists()
        died = Path(self.folder) / "died"
        play = "second" if died.exists() else "first"
        np.save(Path(self.folder) / f"{play}-{state.round + 1}.npy", aggregate.total.numpy())
        if state.round + 1 == 3 and not died.exists():
            died.touch()
            os._exit(1)
        return super().apply(state, aggregate)


@pytest.fixture(autouse=True)
def own_classes_travel():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_rounds_played_again_give_the_server_no_second_sum(ray_session, small_recipe, tmp_path, monkeypatch):
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    recipe, events = small_recipe(*SMALL), []
    recipe = replace(recipe, strategy=Dying(folder=str(tmp_path)), clients=replace(recipe.clients, retries=0))
    run = experiments.run(recipe, out=(tmp_path / "there").as_uri(), on_event=events.append)
    (lost,) = (place for place, event in enumerate(events) if isinstance(event, DriverLost))
    rounds = {event.round: event for event in events[lost:] if isinstance(event, RoundDone)}
    assert [event.clients for event in rounds.values()] == [7, 0, 8, 8]
    sums = {path.stem: np.load(path) for path in tmp_path.glob("*.npy")}
    assert sums.keys() == {"first-1", "first-2", "first-3", "second-1", "second-3", "second-4"}
    # Who failed in the first play alone is left out of the second: without that, the two sums tell its update.
    np.testing.assert_array_equal(sums["first-1"], sums["second-1"])
    assert set(rounds[1].gone.values()) == {LEFT_OUT} and len(rounds[1].gone) == 1
    # Who fails in the second play alone: the round has no result.
    why = "a sum of 8 clients of this round was asked for before, and who is there now differs by 1"
    assert why in rounds[2].aborted
    rows = [row for row in read_log(run.folder / "faults").to_pylist() if row["kind"] == "round"]
    assert [(row["round"], row["who"]) for row in rows] == [(2, "2")] and why in rows[0]["why"]
    # On disk: of whom, and from which models, named by the last round in them.
    entries = {path.name: json.loads(path.read_text()) for path in (tmp_path / "there" / "unmasked").iterdir()}
    assert [entries[f"round-0000{n}.json"]["models"] for n in (1, 2, 3, 4)] == [[0], [1], [2, 1], [3]]
    assert len(entries["round-00001.json"]["clients"]) == 7 and len(entries) == 4
