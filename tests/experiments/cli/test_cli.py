"""The command line: it answers without loading what it does not need, and a run leaves nothing behind."""

import json
import os
import secrets
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from experiments.config.recipe import to_toml

ROOT = Path(__file__).resolve().parents[3]


def test_help_lists_the_commands_and_loads_nothing_heavy(command):
    program = "import experiments.__main__, sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "transformers", "pydantic", "pyarrow"} & set(loaded.stdout.split())
    ended = command("--help")
    assert ended.returncode == 0
    for name in ("run", "submit", "status", "stop", "plan", "partition", "report", "strategies", "schema", "bench"):
        assert name in ended.stdout


def test_version_and_short_help(command):
    assert command("--version").stdout == f"fedpost {version('fedpost')}\n"
    assert command("run", "-h").stdout.splitlines()[1:4] == command("run", "--help").stdout.splitlines()[1:4]


def test_schema_and_strategies(command):
    schema = json.loads(command("schema").stdout)
    assert "rounds" in json.dumps(schema)
    listed = command("strategies", COLUMNS="200").stdout
    assert "fedavg" in listed and "fedprox" in listed and "sum" in listed


def test_partition_shows_the_skew(command, small_recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(small_recipe()))
    ended = command("partition", path)
    assert ended.returncode == 0, ended.stderr
    assert "10 (8 train, 2 unseen)" in ended.stdout and "client-7 (18)" in ended.stdout


def test_a_run_leaves_nothing_but_its_folder(small_recipe, tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    path = work / "recipe.toml"
    path.write_text(to_toml(small_recipe("rounds=1")))
    # Without the tests' own settings: a user has none of them.
    ours = {name: "" for name in os.environ if name.startswith("RAY_")}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    mark = secrets.token_hex(8)  # all that the run starts inherits it
    ended = subprocess.run(
        [sys.executable, "-m", "experiments", "run", str(path)],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(home), "FEDPOST_TEST": mark},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "loss (nats per token)" in ended.stdout and "report.html" in ended.stdout
    assert sorted(p.name for p in work.iterdir()) == ["recipe.toml", "runs"]
    assert [p for p in home.rglob("*") if p.is_file()] == []
    assert [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("FEDPOST_TEST") == mark] == []


def test_a_run_joins_a_cluster_and_leaves_it_running(command, ray_session, small_recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(small_recipe("rounds=1", "clients.slots=1")))
    address = ray_session.get_runtime_context().gcs_address
    ended = command("run", path, "--out", tmp_path / "run", "--address", address)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    assert ray_session.cluster_resources()["CPU"] == 6


@pytest.mark.skipif(not (ROOT / "experiments/models/tiny/model.safetensors").exists(), reason="the base is being made")
def test_the_shipped_base_is_small_and_complete():
    folder = ROOT / "experiments/models/tiny"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
