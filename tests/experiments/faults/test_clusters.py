"""Runs on several nodes, and the examples for schedulers that make a cluster for one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

import experiments
from experiments.config.recipe import to_toml
from experiments.preflight.processes import hidden_gpus

ROOT = Path(__file__).resolve().parents[3]
CLUSTERS = ROOT / "experiments" / "clusters"

# In a process of its own: the Ray of the other tests is in this one.
ON_THREE_NODES = """
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import experiments

recipe, out = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
places = set()


def look(event):
    if type(event).__name__ == "RoundDone":
        places.update(node["NodeID"] for node in ray.nodes() if in_use(node))


def in_use(node):
    free = ray._private.state.available_resources_per_node()[node["NodeID"]]
    return free.get("GPU", 0) < node["Resources"].get("GPU", 0)


try:
    for _ in range(3):
        cluster.add_node(num_cpus=1, num_gpus=1)
    experiments.run(recipe, out=out, address=cluster.address, on_event=look)
finally:
    cluster.shutdown()
print(len(places))
"""


@pytest.mark.slow
def test_slots_on_fractions_of_gpus_over_three_nodes_lead_to_the_same_bits(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("a minute: a cluster of three nodes")
    rounds = "rounds=4"
    plain = experiments.run(small_recipe(rounds), out=tmp_path / "one")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(small_recipe(rounds, "clients={slots=5, num_cpus=0.0, num_gpus=0.5}")))
    command = [sys.executable, "-c", ON_THREE_NODES, recipe, tmp_path / "three"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **hidden_gpus(1)}
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == "3", "five halves take three nodes"
    adapter = "model/adapter_model.safetensors"
    assert (tmp_path / "three" / adapter).read_bytes() == (plain.folder / adapter).read_bytes()


def test_the_kuberay_example_is_a_ray_job_that_runs_a_shipped_recipe():
    job = yaml.safe_load((CLUSTERS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    words = spec["entrypoint"].split()
    assert words[:4] == ["python", "-m", "experiments", "run"] and (ROOT / words[4]).is_file()
    from experiments.config.recipe import load_recipe

    load_recipe(ROOT / words[4], [words[at + 1] for at, word in enumerate(words) if word == "--set"])
    assert yaml.safe_load(spec["runtimeEnvYAML"]).keys() == {"working_dir", "pip", "env_vars"}
    cluster = spec["rayClusterSpec"]
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert pinned == f"ray=={cluster['rayVersion']}"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(group.keys() >= {"rayStartParams", "template"} for group in groups)
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert all(cluster["rayVersion"] in container["image"] for container in containers)
    assert all(container["envFrom"] == [{"secretRef": {"name": "fedpost"}}] for container in containers)


PLAYED = {
    "scontrol": "echo 127.0.0.1",
    "hostname": "echo 127.0.0.1",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
}


def played(folder, commands):
    """Commands that come before those of the same names once the folder's .venv is activated."""
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={folder}:{Path(sys.executable).parent}:$PATH")


@pytest.mark.slow
def test_the_slurm_example_runs_a_recipe_and_ends_with_its_exit_code(small_recipe, tmp_path, full):
    """On one node, with Slurm's own commands played."""
    script = CLUSTERS / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    if not full:
        return
    played(tmp_path, PLAYED)
    (tmp_path / "recipe.toml").write_text(to_toml(small_recipe("rounds=1")))
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment = {**os.environ, "SLURM_JOB_NODELIST": "one", "RAY_PORT": str(free.getsockname()[1])}
    for arguments, code in ((["--out", "run"], 0), (["--out", "run"], 2)):
        batch = subprocess.Popen(
            ["bash", script, "recipe.toml", *arguments], cwd=tmp_path, env=environment, start_new_session=True
        )
        try:
            assert batch.wait(200) == code
        finally:
            started = [process for process in psutil.process_iter() if _session(process) == batch.pid]
            for process in started:
                process.terminate()  # Slurm would end what a batch leaves
            for process in psutil.wait_procs(started, 20)[1]:
                process.kill()
    assert (tmp_path / "run" / "model").is_dir()


def test_the_slurm_example_ends_where_ray_does_not_start(tmp_path):
    played(tmp_path, PLAYED | {"ray": "exit 1"})
    ended = subprocess.run(
        ["bash", CLUSTERS / "slurm.sh", "recipe.toml"],
        cwd=tmp_path,
        env={**os.environ, "SLURM_JOB_NODELIST": "one"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1 and "error: ray start on 127.0.0.1 has ended" in ended.stderr


def _session(process):
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None
