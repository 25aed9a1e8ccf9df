"""What a user can get wrong: one clear sentence with the way out, and nothing half-written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray.cloudpickle
import torch

import experiments
from engine.messages.events import RoundDone
from experiments.config.recipe import to_toml
from experiments.runs.api import build_store, require_short_path
from strategies.averaging.fedavg import FedAvg

ROOT = Path(__file__).resolve().parents[3]


def refused(recipe, out, match, **options):
    """The run is refused with a user's error that matches, and leaves no folder."""
    with pytest.raises(ValueError, match=match) as caught:
        experiments.run(recipe, out=out, **options)
    assert caught.value.exit_code == 2 and not out.exists()


# What else is wrong with a base, its adapters or a cohort is tried where it is noticed, and comes here the same way.
def test_a_base_that_is_no_folder(ray_session, small_recipe, tmp_path):
    refused(small_recipe("model.base=nowhere/at-all"), tmp_path / "run", "nowhere/at-all.*neither a folder")


def test_more_resources_than_there_are(ray_session, small_recipe, tmp_path):
    recipe = small_recipe("clients.num_cpus=1000")
    refused(recipe, tmp_path / "run", "a slot needs 1000 CPUs and 0 GPUs.*has 6 CPUs and 0 GPUs")


def test_a_client_with_only_truncated_completions(ray_session, small_recipe, tmp_path):
    rows = [{"client": "short", "prompt": "a", "completion": str(i)} for i in range(4)]
    rows += [{"client": "long", "prompt": "a" * 60 + str(i), "completion": "b"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = small_recipe(f"data.source.path='{tmp_path / 'rows.jsonl'}'", "cohort.size=1", "data.splits.unseen=0")
    refused(recipe, tmp_path / "run", "no training row left after the cut to train.max_length = 48.*'long'")


def test_sections_that_do_not_go_together(small_recipe):
    with pytest.raises(ValueError, match="but the partition makes only 3 clients"):
        small_recipe('data.partition={kind="iid", clients=3}')
    with pytest.raises(ValueError, match=r"needs model\.dtype = .float32"):
        small_recipe("model.peft=none", "model.dtype=bfloat16")
    with pytest.raises(ValueError, match=r"clients\.num_gpus is 1\.5: give a fraction of one GPU, or whole GPUs"):
        small_recipe("clients.num_gpus=1.5")


def test_missing_data(ray_session, small_recipe, tmp_path):
    refused(small_recipe("data.source.path=gone.jsonl"), tmp_path / "run", "gone.jsonl")


def test_a_folder_that_already_holds_a_run(small_recipe, tmp_path):
    recipe = small_recipe()
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    with pytest.raises(ValueError, match=r"already holds a run: choose another --out, or .* --resume"):
        experiments.run(recipe, out=tmp_path)
    with pytest.raises(ValueError, match=r"differs in seed, train\.batch"):
        experiments.run(small_recipe("seed=6", "train.batch=2", "clients.slots=1"), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        experiments.run(recipe, out=tmp_path / "elsewhere", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_run_is_not_resumed_on_other_data_or_versions(small_recipe, tmp_path):
    recipe = small_recipe()
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"data": {"key": "another"}, "versions": {}}))
    with pytest.raises(ValueError, match="the data has changed since the run"):
        experiments.run(recipe, out=tmp_path, resume=True)
    key = json.loads((build_store(recipe) / "manifest.json").read_text())["key"]
    manifest.write_text(json.dumps({"data": {"key": key}, "versions": {"torch": "1.0"}}))
    with pytest.raises(ValueError, match=r"versions\.torch .* changed since the run in"):
        experiments.run(recipe, out=tmp_path, resume=True)


class Spoiler(FedAvg):
    """Some clients' updates are not a number."""

    def finish(self, update, broadcast, memory, ends=None):
        if update.client in self.spoilt:
            update = replace(update, delta=torch.full_like(update.delta, float("nan")))
        return super().finish(update, broadcast, memory)


@pytest.fixture
def spoil(small_recipe):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def make(spoilt, *changes):
        strategy = Spoiler()
        object.__setattr__(strategy, "spoilt", spoilt)
        return replace(small_recipe(*changes), strategy=strategy)

    yield make
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_client_whose_update_is_nan_is_left_out_and_reported(ray_session, spoil, tmp_path):
    events = []
    # All eight training clients take part, so that the spoilt one does in each round.
    spoilt = {2}
    recipe = spoil(spoilt, "rounds=1", "cohort.size=8")
    run = experiments.run(recipe, out=tmp_path / "run", on_event=events.append)
    (round_,) = [event for event in events if isinstance(event, RoundDone)]
    assert round_.clients == 7 and list(round_.failed.values()) == ["its update holds NaN or infinity"]
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"]


def test_too_many_such_clients_end_the_run(ray_session, spoil, tmp_path):
    recipe = spoil(set(range(10)), "rounds=1", "cohort.size=8")
    with pytest.raises(
        ValueError, match=r"8 of 8 clients of round 1 gave no usable update, more than clients.max_failed"
    ):
        experiments.run(recipe, out=tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "ditto"])  # ditto's clients write files too
def test_a_full_disk_leaves_whole_files_and_a_sentence(ray_session, small_recipe, tmp_path, strategy, full):
    if strategy == "fedavg" and not full:
        pytest.skip("ditto is tried, which writes the same files and more")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(
            ValueError, match=r"the disk that holds .* is full; free some space and run again with --resume"
        ):
            experiments.run(small_recipe("checkpoint.keep=100", "rounds=40", f"strategy={strategy}"), out=disk / "run")
        left = [path.name for path in (disk / "run").rglob("*")]
        assert "recipe.toml" in left and not [name for name in left if name.startswith(".")]
        for checkpoint in (disk / "run" / "checkpoints").glob("*"):
            assert {path.name for path in checkpoint.iterdir()} == {"state.safetensors", "facts.json"}
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def recipe_file(small_recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(small_recipe("rounds=1")))
    return path


def test_the_command_says_one_sentence_and_exits_with_2(command, recipe_file, tmp_path):
    out = tmp_path / "run"
    for arguments, sentence in (
        (["--set", "train.stpes=4"], "there is no key 'train.stpes'; did you mean 'steps'?"),
        (["--address", "127.0.0.1:9"], "there is no Ray at 127.0.0.1:9"),
        (["--address", "ray://127.0.0.1:10001"], "is the address of a Ray client server"),
    ):
        ended = command("run", recipe_file, "--out", out, *arguments)
        assert ended.returncode == 2
        assert sentence in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
        assert "Traceback" not in ended.stderr and not out.exists()


def test_a_missing_recipe_names_the_nearest_shipped_one(command):
    ended = command("run", "experiments/recipes/dmeo.toml")
    assert ended.returncode == 2 and "the nearest is demo.toml" in ended.stderr


def test_a_fault_of_ours_exits_with_1_and_offers_the_traceback(recipe_file, tmp_path, monkeypatch):
    program = (
        "import sys; from experiments import __main__ as m; from experiments.runs import api\n"
        "def broken(*a, **k): raise RuntimeError('planted')\n"
        "api.run = broken\nm.app(sys.argv[1:])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "run", recipe_file], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1 and "RuntimeError: planted" in ended.stderr and "--debug" in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="macOS allows fewer bytes and does not read TMPDIR")
@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_for_temporary_files_whose_path_is_too_long_for_sockets(monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    rest = len(f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    monkeypatch.setenv(variable, "/" + "l" * (106 - rest))  # 107 bytes, as many as Linux allows
    require_short_path()
    monkeypatch.setenv(variable, "/" + "l" * (116 - rest))
    with pytest.raises(ValueError, match=r"/ll+/ray, has a path that is 10 bytes too long for Ray's sockets: set"):
        require_short_path()
