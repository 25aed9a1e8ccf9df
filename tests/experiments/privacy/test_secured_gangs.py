"""What a client raises in a gang under secure aggregation: the gang is made anew, as in the clear."""

import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray.cloudpickle

import experiments
from engine.records.metrics import read_log
from strategies.averaging.fedavg import FedAvg

ZERO = "clients.zero={stage=2, ranks=2, timeout_s=15}"
SMALL = (
    "clients.slots=1",
    "rounds=1",
    "cohort.size=3",
    "evaluate.every=0",
    ZERO,
    "privacy={rows_cap=20, secagg={mode='full'}}",
)


@dataclass(frozen=True)
class Wrong(FedAvg):
    """FedAvg of which one rank, once, has a client with a value that is none."""

    folder: str = ""

    def finish(self, update, broadcast, memory, ends):
        """As FedAvg's, but for the first time that anybody comes here."""
        with suppress(FileExistsError):
            (Path(self.folder) / "raised").touch(exist_ok=False)
            raise ValueError("its rows have no value")
        return super().finish(update, broadcast, memory, ends)


@pytest.mark.slow
def test_a_wrong_value_of_a_client_ends_its_gang_and_not_the_run(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("two runs of gangs; in the clear it is the same way")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    recipe = small_recipe(*SMALL)
    run = experiments.run(replace(recipe, strategy=Wrong(folder=str(tmp_path))), out=tmp_path / "run")
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ((kind, why),) = {(row["kind"], row["why"]) for row in read_log(run.folder / "faults").to_pylist()}
    assert kind == "slot" and "ValueError: its rows have no value" in why
    undisturbed = experiments.run(recipe, out=tmp_path / "undisturbed")
    name = "adapter_model.safetensors"
    assert (run.model / name).read_bytes() == (undisturbed.model / name).read_bytes()
