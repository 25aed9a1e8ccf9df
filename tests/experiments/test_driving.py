"""The driver's life as the command sees it."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
from ray.exceptions import ObjectLostError

import experiments
from engine.events import DriverLost, RoundDone, Started
from strategies.fedavg import FedAvg


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
    recipe, told = small_recipe("evaluate.every=0"), []
    undisturbed = experiments.run(recipe, out=tmp_path / "undisturbed")
    losing = replace(recipe, strategy=Losing(folder=str(tmp_path)))
    run = experiments.run(losing, out=tmp_path / "run", on_event=told.append)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sum(isinstance(event, DriverLost) for event in told) == 2
    assert [event.resumed for event in told if isinstance(event, Started)] == [None, 2, 2]
    assert [event.round for event in told if isinstance(event, RoundDone)] == [1, 2, 3, 4]
    model = "adapter_model.safetensors"
    assert (run.model / model).read_bytes() == (undisturbed.model / model).read_bytes()
    (written,) = (run.folder / "faults").iterdir()
    assert pq.read_table(written)["kind"].to_pylist() == ["driver", "driver"]
