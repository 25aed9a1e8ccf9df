"""A run is resumed on the base, the code and the trace that it was begun with, and on no others."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import experiments
from engine.messages.events import Started
from experiments.config.recipe import to_toml
from experiments.runs import digests, driving
from experiments.runs.api import _manifest, build_store
from experiments.runs.resuming import continued, earlier_manifest

OWN = """
from dataclasses import dataclass
from strategies.averaging.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    pass
"""


def fedpost_changed(run):
    """As if the run had been begun with other code of fedpost."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["digests"]["the code of fedpost"] = "another"
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def begun(small_recipe, tiny_base, tmp_path, monkeypatch):
    """A recipe with a base, a rule and a trace of its own, and the folder of its run, of which nothing is done yet."""
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "trace.csv").write_text("client,first,last\nclient-3,1,9\n")
    recipe = small_recipe("model.base=base", "strategy.kind=mine:Mine", "clients.availability.trace=trace.csv")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(to_toml(recipe))
    (run / "manifest.json").write_text(json.dumps(_manifest(recipe, build_store(recipe))))
    yield recipe, run
    sys.modules.pop("mine")


def retrained(folder):
    """Other weights of the same shapes: another file of the same size and header."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: np.nextafter(w, np.float32(9)) for name, w in weights.items()}, folder / "model.safetensors")


def resumed(run, recipe, accept=False):
    """The manifest with which the run would continue now."""
    return continued(run, earlier_manifest(run), _manifest(recipe, build_store(recipe)), accept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda here: retrained(here / "base"), "model.base changed"),
        (lambda here: (here / "mine.py").write_text(f"{OWN}    lr = 2\n"), "the code of mine changed"),
        (lambda here: fedpost_changed(here / "run"), "the code of fedpost changed"),
        (lambda here: (here / "trace.csv").write_text("client,first,last\n"), "clients.availability.trace changed"),
    ],
)
def test_a_run_is_not_resumed_on_another_base_rule_or_trace(begun, tmp_path, change, said):
    recipe, run = begun
    resumed(run, recipe)
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"^{said} since the run in .*run was begun: restore what it was"):
        experiments.run(recipe, out=run, resume=True)


def test_a_driver_that_replaces_another_does_not_continue_on_another_base(ray_session, begun, tmp_path, monkeypatch):
    def drive(recipe, options, stop):
        started = Started(1, 1, training=8, unseen=2, dropped_rows=0, parameters=1, base_bytes=1, without_gpu=0,
                          resumed=None, lanes=1)  # fmt: skip
        yield started
        retrained(tmp_path / "base")
        yield started

    monkeypatch.setattr(driving, "drive", drive)
    with pytest.raises(ValueError, match=r"^model\.base changed since the run"):
        experiments.run(begun[0], out=tmp_path / "new")


def test_accepted_changes_are_listed_and_not_asked_about_again(begun, tmp_path):
    recipe, run = begun
    fedpost_changed(run)
    retrained(tmp_path / "base")
    manifest = resumed(run, recipe, accept=True)
    assert sorted(manifest["accepted_changes"]) == ["model.base", "the code of fedpost"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert resumed(run, recipe) == manifest
    manifest["versions"]["torch"] = "2.0"
    (run / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "trace.csv").write_text("client,first,last\n")
    with pytest.raises(ValueError, match=r"^clients\.availability\.trace and versions\.torch \(2\.0, now .*changed"):
        resumed(run, recipe)
    assert len(resumed(run, recipe, accept=True)["accepted_changes"]) == 4


def test_other_rows_are_not_accepted(begun):
    recipe, run = begun
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["key"] = "other rows"
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the data has changed"):
        resumed(run, recipe, accept=True)


def test_a_run_that_was_killed_before_its_manifest_goes_on_and_one_that_lost_it_does_not(begun):
    recipe, run = begun
    (run / "manifest.json").unlink()
    resumed(run, recipe)
    (run / "checkpoints" / "00001").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not the manifest of a run"):
        resumed(run, recipe)


def test_the_digest_of_fedpost_is_of_its_modules_wherever_they_are(tmp_path, monkeypatch):
    before = digests.code_digest()
    for package in digests.SHIPPED:
        shutil.copytree(Path(sys.modules[package].__file__).parent, tmp_path / f"at-{package}" / package)
        there = tmp_path / f"at-{package}" / package / "__init__.py"  # as Ray unpacks modules, each in its own folder
        monkeypatch.setattr(sys.modules[package], "__file__", str(there))
    assert digests.code_digest() == before
    there.write_bytes(there.read_bytes().replace(b"\n", b"\r\n"))
    (there.parent / ".checkpoints").mkdir()
    (there.parent / ".checkpoints" / "copy.py").touch()
    assert digests.code_digest() == before
    there.write_bytes(there.read_bytes() + b"LEVEL = 2\n")
    assert digests.code_digest() != before


def test_runs_of_before_there_were_digests_go_on(begun, tmp_path):
    recipe, run = begun
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["digests"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    retrained(tmp_path / "base")
    resumed(run, recipe)


def test_of_large_files_a_part_is_read_and_small_ones_whole(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(digests.BLOCK * 3))
    before = digests.file_digest(small)
    small.write_bytes(bytes(digests.BLOCK * 2 + 5) + b"!" + bytes(digests.BLOCK - 6))
    assert digests.file_digest(small) != before
    seen = set()
    for changed in (0, 20 * 2**20, 64 * 2**20 - 1, None):  # the first byte, one between blocks, the last, none
        with large.open("wb") as file:
            file.truncate(64 * 2**20)
            if changed is not None:
                file.seek(changed)
                file.write(b"!")
        seen.add(digests.file_digest(large))
    assert len(seen) == 3


def test_a_base_of_the_hub_is_known_by_its_commit(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    recipe, here = small_recipe("model.base=some/model"), tmp_path / "models--some--model"
    without_base = digests.digests(recipe)
    assert without_base.keys() == {"the code of fedpost"}
    for commit in ("a" * 40, "b" * 40):
        (here / "snapshots" / commit).mkdir(parents=True)
        (here / "snapshots" / commit / "config.json").write_text("{}")
        (here / "refs").mkdir(exist_ok=True)
        (here / "refs" / "main").write_text(commit)
        assert digests.digests(recipe) == without_base | {"model.base": f"commit {commit}"}
    assert digests.digests(small_recipe("model.base=no name")) == without_base
