"""The driver's life as the command sees it."""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
from ray.exceptions import ObjectLostError

import experiments
from engine.messages.events import Checkpointed, DriverLost, RoundDone, Started
from engine.rounds.driver import Driver
from engine.scheduling.pool import Pool
from engine.workers.worker import ClientActor
from experiments.runs import driving
from strategies.averaging.fedavg import FedAvg


@dataclass(frozen=True)
class Losing(FedAvg):
    """FedAvg whose server finds, twice in the third round, that what it needs was on a node that is gone."""

    folder: str = ""

    def apply(self, state, aggregate):
        """As FedAvg's, or not at all."""
        marks = [Path(self.folder) / f"lost-{n}" for n in range(2)]
        left = [mark for mark in marks if not mark.exists()]
        if left and state.round == 2:
            left[0].touch()
            raise ObjectLostError("a shard", None, "")
        return super().apply(state, aggregate)


@pytest.mark.slow
def test_what_a_node_takes_with_it_ends_a_driver_and_not_the_run(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("a driver that is killed is tried")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    recipe, events = small_recipe("evaluate.every=0"), []
    undisturbed = experiments.run(recipe, out=tmp_path / "undisturbed")
    losing = replace(recipe, strategy=Losing(folder=str(tmp_path)))
    run = experiments.run(losing, out=tmp_path / "run", on_event=events.append)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sum(isinstance(event, DriverLost) for event in events) == 2
    assert [event.resumed for event in events if isinstance(event, Started)] == [None, 2, 2]
    assert [event.round for event in events if isinstance(event, RoundDone)] == [1, 2, 3, 4]
    model = "adapter_model.safetensors"
    assert (run.model / model).read_bytes() == (undisturbed.model / model).read_bytes()
    (written,) = (run.folder / "faults").iterdir()
    assert pq.read_table(written)["kind"].to_pylist() == ["driver", "driver"]


def kill_driver(others):
    """Kills the driver that is none of the others."""
    (driver,) = drivers() - others
    driver.kill()


def drivers():
    """The processes of all living drivers of this session's Ray."""
    processes = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ray::Driver" in "".join(process.cmdline()[:1]):
                processes.add(process)
    return processes


def test_drivers_that_all_die_after_a_round_and_before_its_checkpoint_end_the_run(
    ray_session, small_recipe, tmp_path, monkeypatch, full
):
    monkeypatch.setattr(driving, "FUTILE", 3 if full else 1)
    others, events = drivers(), []

    def kill(event):
        events.append(event)
        assert not isinstance(event, Checkpointed) and len(events) < 60, "it would go on for ever"
        if isinstance(event, RoundDone) and event.round == 2:
            kill_driver(others)  # held up by its next event, which is not asked for while this goes on

    with pytest.raises(ValueError, match=r"the driver ended \d times without getting further .*--resume"):
        experiments.run(small_recipe("evaluate.every=0", "checkpoint.every=4"), out=tmp_path / "run", on_event=kill)
    assert [event.round for event in events if isinstance(event, RoundDone)] == [1, 2] * (driving.FUTILE + 1)


@pytest.mark.slow
def test_drivers_that_each_get_further_do_not_end_it_though_no_checkpoint_is_between(
    ray_session, small_recipe, tmp_path, monkeypatch, full
):
    if not full:
        pytest.skip("drivers that get no further are tried")
    monkeypatch.setattr(driving, "FUTILE", 1)
    others, events = drivers(), []

    def kill(event):
        events.append(event)
        if (
            isinstance(event, RoundDone)
            and event.round > sum(isinstance(earlier, DriverLost) for earlier in events) < 3
        ):
            kill_driver(others)

    experiments.run(small_recipe("evaluate.every=0", "checkpoint.every=9"), out=tmp_path / "run", on_event=kill)
    assert [event.round for event in events if isinstance(event, RoundDone)] == [1, 1, 2, 1, 2, 3, 1, 2, 3, 4]


class DyingAtItsStart(ClientActor):
    """Ends its process while it is given base and rows, the first time in a run."""

    def attach(self, packed, base, tokens, first):
        """As any slot's, or not at all."""
        mark = self.folder.parent.with_suffix(".mark")
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return super().attach(packed, base, tokens, first)


class DriverOfSuch(Driver):
    """A driver whose slots die at their start."""

    def _run(self, at_end):
        Pool.client = DyingAtItsStart
        return super()._run(at_end)


def test_a_slot_that_dies_while_it_is_given_the_base_does_not_end_the_run(
    ray_session, small_recipe, tmp_path, monkeypatch
):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("engine.rounds.driver.Driver", DriverOfSuch)
    events = []
    run = experiments.run(small_recipe("evaluate.every=0", "rounds=1"), out=tmp_path / "run", on_event=events.append)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert (tmp_path / "run.mark").exists() and run.model.exists()
    assert [type(event) for event in events if isinstance(event, DriverLost | Started)] == [DriverLost, Started]
