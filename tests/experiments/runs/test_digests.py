"""A run is resumed on the base, the code and the trace that it was begun with, and on no others."""

import importlib
import json
import shutil
import sys

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import experiments
from experiments.config.recipe import to_toml
from experiments.runs import digests
from experiments.runs.api import _manifest, build_store
from experiments.runs.resuming import refuse_other_parts

OWN = """
from dataclasses import dataclass
from strategies.averaging.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    pass
"""


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda here: retrained(here / "base"), "model.base changed"),
        (lambda here: (here / "mine.py").write_text(f"{OWN}    lr = 2\n"), "the code of mine changed"),
        (lambda here: (here / "trace.csv").write_text("client,first,last\n"), "clients.availability.trace changed"),
    ],
)
def test_a_run_is_not_resumed_on_another_base_rule_or_trace(begun, tmp_path, change, said):
    recipe, run = begun
    refuse_other_parts(run, _manifest(recipe, build_store(recipe)))
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"^{said} since the run in .*run was begun: restore what it was"):
        experiments.run(recipe, out=run, resume=True)


def test_runs_of_before_there_were_digests_go_on(begun, tmp_path):
    recipe, run = begun
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["digests"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    retrained(tmp_path / "base")
    refuse_other_parts(run, _manifest(recipe, build_store(recipe)))


def test_of_large_files_a_part_is_read_and_small_ones_whole(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(digests.BLOCK * 3))
    before = digests._digest(small)
    small.write_bytes(bytes(digests.BLOCK * 2 + 5) + b"!" + bytes(digests.BLOCK - 6))
    assert digests._digest(small) != before
    seen = set()
    for changed in (0, 20 * 2**20, 64 * 2**20 - 1, None):  # the first byte, one between blocks, the last, none
        with large.open("wb") as file:
            file.truncate(64 * 2**20)
            if changed is not None:
                file.seek(changed)
                file.write(b"!")
        seen.add(digests._digest(large))
    assert len(seen) == 3


def test_a_base_of_the_hub_is_known_by_its_commit(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    recipe, here = small_recipe("model.base=some/model"), tmp_path / "models--some--model"
    assert digests.digests(recipe) == {}
    for commit in ("a" * 40, "b" * 40):
        (here / "snapshots" / commit).mkdir(parents=True)
        (here / "snapshots" / commit / "config.json").write_text("{}")
        (here / "refs").mkdir(exist_ok=True)
        (here / "refs" / "main").write_text(commit)
        assert digests.digests(recipe) == {"model.base": f"commit {commit}"}
    assert digests.digests(small_recipe("model.base=no name")) == {}
