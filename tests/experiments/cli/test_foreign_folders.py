"""Run folders and stores from elsewhere: nothing in them is run or unpickled, and no name in them leads out."""

import json
import os
import pickle
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import experiments
from datasets_partition.store import sealed
from datasets_partition.store.sealed import key_of
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.messages.shards import ShardedState
from engine.records.checkpoint import Saved, load_checkpoint, save_checkpoint
from engine.records.client_state import ClientStates
from engine.records.metrics import Ledger, Metrics, read_log
from engine.workers.token_columns import token_columns
from experiments.config.recipe import load_recipe, located, to_toml
from experiments.report.page import write_report
from experiments.runs.api import build_store
from strategies.core.protocol import ServerState


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def bomb(tmp_path):
    """A pickle that leaves a mark, which the test must not."""
    mark, content = tmp_path / "mark", pickle.dumps(Bomb(tmp_path / "mark"))
    pickle.loads(content).close()
    mark.unlink()
    yield content
    assert not mark.exists()


@pytest.fixture
def run(tmp_path, small_recipe):
    """What a killed run leaves."""
    folder = tmp_path / "run"
    metrics, ledger = Metrics(folder / "metrics"), Ledger(folder / "ledger")
    for round_ in (0, 1):
        metrics.add(round_, "heldout", None, loss=3.0 - round_)
        ledger.received(round_, "server", "update", 3, 100)
        metrics.flush(round_), ledger.flush(round_)
        state = ShardedState(round_, (ServerState(round_, torch.zeros(3)),))
        save_checkpoint(folder / "checkpoints", Saved(state, 1.0), 2)
    ClientStates(folder / "client_state").write(3, 1, {"strategy.c": torch.zeros(3)}, 0)
    (folder / "privacy.json").write_text('{"rounds": 1, "statement": "epsilon 1"}')
    (folder / "recipe.toml").write_text(to_toml(small_recipe()))
    (folder / "manifest.json").write_text('{"data": {"key": "x"}, "versions": {}}')
    write_report([folder], tmp_path / "whole.html")
    return folder


READERS = {
    "recipe.toml": lambda run, recipe: experiments.run(recipe, out=run, resume=True),
    "manifest.json": lambda run, recipe: experiments.run(recipe, out=run, resume=True),
    "checkpoints": lambda run, recipe: load_checkpoint(run / "checkpoints"),
    "client_state": lambda run, recipe: ClientStates(run / "client_state").read(3, 1),
    "metrics": lambda run, recipe: read_log(run / "metrics"),
    "ledger": lambda run, recipe: read_log(run / "ledger"),
}


@pytest.mark.parametrize("part", READERS)
def test_a_resumed_run_unpickles_nothing(run, small_recipe, bomb, part):
    _spoil(run / part, bomb)
    with pytest.raises(ValueError, match=r"(?s)^.+$"):
        READERS[part](run, small_recipe())


@pytest.mark.parametrize("part", ["", "recipe.toml", "manifest.json", "privacy.json", "metrics", "ledger"])
def test_a_report_unpickles_nothing(run, bomb, tmp_path, part):
    _spoil(run / part, bomb)
    with pytest.raises(ValueError, match=rf"{run}.*(is not valid|is not the JSON|cannot be read)"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def _spoil(path: Path, content: bytes, *, same_size: bool = False) -> None:
    """Puts `content` in the place of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(content.ljust(file.stat().st_size if same_size else 0, b"\0"))


@pytest.fixture
def store(tmp_path, small_recipe):
    """A store of its own with token columns, and their recipe."""
    recipe = located(small_recipe(f"data.cache='{tmp_path / 'stores'}'"))
    folder = build_store(recipe)
    return folder, token_columns(folder, recipe), recipe


@pytest.mark.parametrize("name", ["*", "manifest.json", "index.arrow"])
def test_a_store_of_pickles_is_refused(store, bomb, name):
    folder, tokens, recipe = store
    for made, find in ((tokens, lambda: token_columns(folder, recipe)), (folder, lambda: build_store(recipe))):
        for path in made.glob(name):
            if path.is_file():
                _spoil(path, bomb, same_size=path.name != "manifest.json")
        with pytest.raises(ValueError, match="is not what belongs there, or is damaged: move or delete it"):
            find()


def test_rows_and_tokens_that_are_pickles_are_refused_where_they_are_read(store, bomb):
    folder, tokens, _ = store
    for path in (folder / "rows.parquet", tokens / "tokens.arrow"):
        _spoil(path, bomb, same_size=True)
    with pytest.raises(ValueError, match="is damaged"):
        Store.open(folder).read_rows(0, "train")
    with pytest.raises(ValueError, match="is damaged"):
        Tokens.open(tokens).rows(0, "train")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "below/rows.parquet", ".."])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(store, name, tmp_path, monkeypatch):
    folder, _, _ = store
    (tmp_path / "stores" / "outside").write_text("x")
    size = (folder / name).stat().st_size if (folder / name).exists() else 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert key_of(folder) == manifest["key"]
    manifest["bytes"][name] = size
    monkeypatch.setattr(sealed, "_digest", lambda *_: manifest["digest"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert key_of(folder) is None


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/outside.safetensors", "shard-00000.safetensors/../x"])
def test_a_checkpoint_that_names_a_file_elsewhere_is_refused(run, name):
    for checkpoint in (run / "checkpoints").iterdir():
        facts = json.loads((checkpoint / "facts.json").read_text())
        (of_state,) = facts["files"].values()
        facts["files"] = {name: of_state}
        rest = {key: value for key, value in facts.items() if key != "digest"}
        digest = sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        (checkpoint / "facts.json").write_text(json.dumps(rest | {"digest": digest}))
        shutil.copyfile(checkpoint / "state.safetensors", run / "outside.safetensors")
    with pytest.raises(ValueError, match=r"cannot be read .*it lists no state"):
        load_checkpoint(run / "checkpoints")


@pytest.mark.parametrize("name", ["../evil", "/evil", ".evil", "a/b"])
def test_a_runs_name_that_is_a_path_is_refused(small_recipe, name):
    with pytest.raises(ValueError, match="name becomes a folder's name"):
        replace(small_recipe(), name=name)


def test_links_that_lead_out_are_neither_read_nor_written_through(run, small_recipe, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"token": "planted"}')
    for file, target in (("manifest.json", secret), ("checkpoints", tmp_path), ("metrics/round-00000.parquet", secret)):
        aside = (run / file).rename(tmp_path / "aside")
        (run / file).symlink_to(target)
        for read in (lambda: write_report([run], tmp_path / "report.html"), lambda: resumed(run, small_recipe())):
            with pytest.raises(ValueError, match=rf"{file} is a link that leads out of the run folder"):
                read()
        (run / file).unlink()
        aside.rename(run / file)
    assert not (tmp_path / "report.html").exists()
    (run / "recipe.toml").rename(run / "begun.toml")
    (run / "recipe.toml").symlink_to("begun.toml")
    write_report([run], tmp_path / "report.html")


def resumed(run, recipe):
    """Nothing: the run is refused before anything is started."""
    experiments.run(recipe, out=run, resume=True)


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(run, tmp_path):
    os.mkfifo(run / "metrics" / "round-00002.parquet")
    with pytest.raises(ValueError, match=r"round-00002\.parquet is neither a file nor a folder"):
        write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize(
    "section",
    [
        'strategy = "evil:Mine"',
        '[strategy]\nkind = "evil:Mine"',
        '[data.partition]\nkind = "combined"\nfirst = "evil:Mine"\nthen = "iid"',
    ],
)
def test_code_that_a_run_folder_names_is_not_imported(run, small_recipe, tmp_path, monkeypatch, section):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (run / "recipe.toml").write_text(section)
    with pytest.raises(ValueError, match=r"names code that the recipe to resume with does not \(evil:Mine"):
        resumed(run, small_recipe())
    assert not (tmp_path / "mark").exists()
    with pytest.raises(ValueError):
        load_recipe(run / "recipe.toml")  # which is what whoever runs that recipe asks for
    assert (tmp_path / "mark").exists()
