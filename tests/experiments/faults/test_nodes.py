"""A Ray node that is removed in the midst of a round, with all that runs and lies on it: the same bits in the end."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import experiments
from experiments.config.recipe import to_toml

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = "adapter_model.safetensors"
SECURED = ("privacy.secagg.mode=full", "privacy.secagg.active=true", 'strategy={kind="fedavg", weighting="uniform"}')
# Nobody is tried again: whom the node's end took with it was not at fault.
QUIET = ("evaluate.every=0", "clients.slots=4", "cohort.size=8", "rounds=3", "clients.retries=0")
# Updates of more bytes than Ray sends within a reply: they lie where they were made.
LARGE = 'model.peft={kind="lora", r=40, alpha=40}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "at"),
    [((), "work"), (("strategy=median", LARGE), "work"), (("strategy=median", LARGE), "close"), (SECURED, "work")],
    ids=["sum", "each", "each-at-the-end", "secured"],
)
def test_a_node_that_is_removed_in_a_round_changes_no_bit(ray_session, small_recipe, tmp_path, full, changes, at):
    if not full:
        pytest.skip("a minute: a cluster of two nodes")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(small_recipe(*QUIET, *changes)))
    undisturbed = experiments.run(recipe, out=tmp_path / "undisturbed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    ended = subprocess.run(
        [sys.executable, "-c", REMOVED, str(recipe), str(tmp_path / "run"), at],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "run" / "model" / ADAPTER).read_bytes() == (undisturbed.model / ADAPTER).read_bytes()
    (written,) = (tmp_path / "run" / "faults").iterdir()
    faults = pq.read_table(written).to_pylist()
    assert {fault["round"] for fault in faults} == {2}, "it was not struck in the round"
    assert {fault["kind"] for fault in faults} == {"slot"}, faults
    assert sum("no place for another" in fault["why"] for fault in faults) == 2
    if at == "close":  # whose sum had been had, and whose updates lay there
        assert set((tmp_path / "first").read_text().split()) <= set((tmp_path / "again").read_text().split())


REMOVED = """
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import engine.rounds.driver
import experiments
from engine.workers.worker import ClientActor
from engine.scheduling.pool import Pool

FOLDER, AT = Path(sys.argv[2]).parent, sys.argv[3]
STRIKE = FOLDER / "strike"


def wait_for_strike():
    while not STRIKE.exists():
        time.sleep(0.01)


class Struck(ClientActor):
    '''In the second round it waits for the end of its node, or, on the other node, until that is near.'''

    clients = ()  # of the second round

    def _there(self):
        return (FOLDER / "node").read_text() == ray.get_runtime_context().get_node_id()

    def attach(self, *arguments):
        attached = super().attach(*arguments)
        trainer_of = self.attached.runner.trainer_of

        def struck(unit, message):
            self.strike(unit, message.round)
            return trainer_of(unit, message)

        self.attached.runner.trainer_of = struck
        return attached

    def strike(self, unit, round_):
        self.clients = (*self.clients, *unit) if round_ == 1 else ()
        if round_ == 1 and STRIKE.exists():
            with (FOLDER / "again").open("a") as file:
                file.write(f"{unit[0]}\\n")
        if self.clients and AT == "work":
            if not self._there():
                wait_for_strike()
            elif len(self.clients) == 2:
                STRIKE.touch()
                time.sleep(60)

    def section_of_sum(self, first, size):
        if self.clients and AT == "close" and self._there():
            try:
                with (FOLDER / "first").open("x") as file:
                    file.write(" ".join(map(str, self.clients)))
            except FileExistsError:
                time.sleep(1)  # until the first one's answer is there
                STRIKE.touch()
                time.sleep(60)
        return super().section_of_sum(first, size)


class Driver(engine.rounds.driver.Driver):
    def _run(self, at_end):
        Pool.client = Struck
        return super()._run(at_end)


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
node = cluster.add_node(num_cpus=2)
(FOLDER / "node").write_text(node.node_id)


def remove():
    wait_for_strike()
    cluster.remove_node(node, allow_graceful=False)


engine.rounds.driver.Driver = Driver
threading.Thread(target=remove, daemon=True).start()
try:
    experiments.run(Path(sys.argv[1]), out=Path(sys.argv[2]), address=cluster.address)
finally:
    cluster.shutdown()
"""
