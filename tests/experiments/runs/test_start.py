"""A run begins where an earlier one ended: from its folder, its model, or a URI, and only on the same base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import experiments
from engine.messages.events import Evaluated
from experiments.runs.digests import base_digest
from experiments.runs.start import started

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def earlier(small_recipe, tmp_path):
    """The folder of an earlier that has left an adapter, whose tensors nobody reads here."""
    folder = tmp_path / "earlier"
    (folder / "model").mkdir(parents=True)
    for name in FILES:
        (folder / "model" / name).write_text("{}")
    (folder / "recipe.toml").touch()
    model = small_recipe().model
    manifest = {"digests": {"model.base": base_digest(model)}, "base": {"name": model.base}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def begun(recipe, start):
    """The recipe that the engine would get, the names of the start's files, and the digest of the start."""
    with started(replace(recipe, model=replace(recipe.model, start=str(start)))) as (recipe, digest):
        folder = recipe.model.start
        return folder, sorted(path.name for path in Path(folder).iterdir()), digest


def test_a_start_is_a_runs_folder_its_model_or_a_uri(small_recipe, earlier, monkeypatch):
    monkeypatch.chdir(earlier.parent)
    starts = ("earlier", earlier / "model", f"file://{earlier}", f"file://{earlier}/model/")
    folders, names, digests = zip(*(begun(small_recipe(), start) for start in starts), strict=True)
    assert set(map(tuple, names)) == {FILES} and folders[:2] == (str(earlier / "model"),) * 2
    assert len({digest["model.start"] for digest in digests}) == 1
    assert not any(Path(folder).exists() for folder in folders[2:]), "the copies are left"
    (earlier / "model" / FILES[1]).write_text("{ }")
    assert begun(small_recipe(), earlier)[2] != digests[0]


def test_a_start_on_another_base_is_refused(small_recipe, earlier):
    manifest = json.loads((earlier / "manifest.json").read_text())
    manifest["digests"]["model.base"] = "0" * 64
    (earlier / "manifest.json").write_text(json.dumps(manifest))
    for start in (earlier, earlier / "model", f"file://{earlier}", f"file://{earlier}/model"):
        with pytest.raises(ValueError, match=r"trained on another base .* than the recipe's .*: set model.base"):
            begun(small_recipe(), start)
    manifest["digests"]["model.base"] = f"commit {'0' * 40}"  # says nothing of a folder
    (earlier / "manifest.json").write_text(json.dumps(manifest))
    begun(small_recipe(), earlier)


def test_what_is_no_start_is_refused(small_recipe, earlier, tmp_path):
    for start in (tmp_path / "absent", f"file://{tmp_path}/absent"):
        with pytest.raises(ValueError, match=f"model.start is '{start}', (and there|where there) is no "):
            begun(small_recipe(), start)
    with pytest.raises(ValueError, match=r"an adapter, and the recipe trains all weights: train an adapter"):
        begun(small_recipe("model.peft=none"), earlier)
    (earlier / "model" / FILES[1]).rename(earlier / "model" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors, and pickled files are not read"):
        begun(small_recipe(), earlier)
    (earlier / "model" / FILES[0]).unlink()
    with pytest.raises(ValueError, match=r"holds neither a PEFT adapter nor a model"):
        begun(small_recipe(), earlier)
    shutil.rmtree(earlier / "model")
    with pytest.raises(ValueError, match=r"has no model yet: continue it with --resume first"):
        begun(small_recipe(), earlier)


def test_a_whole_model_is_a_start_of_full_tuning_alone(small_recipe, tiny_base, tmp_path):
    with pytest.raises(ValueError, match=f"a whole model, and .* an adapter: set model.base to {tiny_base}"):
        begun(small_recipe(), tiny_base)
    assert begun(small_recipe("model.peft=none"), tiny_base)[0] == str(tiny_base)
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ValueError, match=r"a model of another hidden_size than model.base"):
        begun(small_recipe("model.peft=none"), other)


def test_a_run_begins_where_an_earlier_one_ended(ray_session, small_recipe, tmp_path):
    changes, at_the_start = ("rounds=1", "cohort.size=3", "evaluate.samples=0"), []
    first = experiments.run(small_recipe(*changes), out=tmp_path / "first")

    def look(event):
        if isinstance(event, Evaluated) and event.round == 0:
            at_the_start.append(event.losses)

    start = f"model.start='{first.folder}'"
    second = experiments.run(small_recipe(*changes, start), out=tmp_path / "second", on_event=look)
    assert at_the_start == [first.losses["end"]] and at_the_start != [first.losses["round 0"]]
    assert second.losses["end"]["heldout"] < first.losses["end"]["heldout"]
    manifest = json.loads((second.folder / "manifest.json").read_text())
    assert manifest["start"] == str(first.folder) and len(manifest["digests"]["model.start"]) == 64
    assert "Begun from an earlier model" in (second.model / "README.md").read_text()
    more = ("rounds=2", *changes[1:])
    with pytest.raises(ValueError, match=r"differs in model.start, rounds"):
        experiments.run(small_recipe(*more), out=second.folder, resume=True)
    shutil.copytree(second.model, first.model, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"model.start changed since the run in .* was begun"):
        experiments.run(small_recipe(*more, start), out=second.folder, resume=True)
