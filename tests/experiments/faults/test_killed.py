"""A command that is killed with SIGKILL, and started again before its cluster has noticed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import experiments
from experiments.config.recipe import to_toml

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = "adapter_model.safetensors"


@pytest.mark.slow
def test_a_command_that_is_killed_takes_its_cluster_along_and_another_goes_on_at_once(
    ray_session, small_recipe, tmp_path, full
):
    if not full:
        pytest.skip("half a minute: a killed command is resumed in the tests' own process")
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(to_toml(small_recipe("evaluate.every=0", "rounds=12")))
    # As on a machine that nobody has prepared: no cluster to join, and each command's token its own.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "RAY_AUTH"))
    }
    command = [sys.executable, "-m", "experiments", "run", str(recipe), "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        killed = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        while not (out / "checkpoints" / "00002").exists():
            assert killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        cluster = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
        killed.wait()
        alive = sum(process.is_running() for process in cluster)
        resumed = subprocess.run([*command, "--resume"], cwd=ROOT, stdout=log, stderr=log, env=environment, timeout=200)
    assert resumed.returncode == 0, (tmp_path / "log").read_text()
    assert alive > 3, "the dead command's cluster had ended already"
    _, left = psutil.wait_procs(cluster, timeout=60)
    assert not left
    undisturbed = experiments.run(small_recipe("evaluate.every=0", "rounds=12"), out=tmp_path / "undisturbed")
    assert (out / "model" / ADAPTER).read_bytes() == (undisturbed.model / ADAPTER).read_bytes()
