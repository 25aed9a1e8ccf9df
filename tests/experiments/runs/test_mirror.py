"""Run folders at URIs: what is there is whole at any time, and a run goes on from it on another machine."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import experiments
from datasets_partition.sources import location
from datasets_partition.sources.location import located, within
from engine.aggregation.privacy_account import PrivacyAccount
from engine.messages.events import RoundDone, Started
from experiments.config.recipe import to_toml
from experiments.runs import mirror
from experiments.runs.mirror import AHEAD, Mirror, working_folder
from strategies.core.layout import Layout

SEALED = {
    "manifest.json": "m",
    "metrics/round-00001.parquet": "1",
    "checkpoints/00001/state.safetensors": "s",
    "checkpoints/00001/facts.json": "f",
    "recipe.toml": "r",
    "model/adapter.safetensors": "a",
    "report.html": "h",
    "finished.json": "e",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Forgets all that is on this machine, as if the next call were on another."""
    node = tmp_path / "node"
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(node))
    node.mkdir()

    def renewed():
        shutil.rmtree(node)
        node.mkdir()

    return renewed


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        scratch.write_text(text)
        scratch.rename(path)


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bucket(monkeypatch):
    """The URI of an empty bucket of an object store on loopback."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"?scheme=http&region=us-east-1&allow_bucket_creation=true&endpoint_override={host}:{port}"
    located(f"s3://bucket{options}")[0].create_dir("bucket")
    yield f"s3://bucket{options}"
    server.stop()


def test_a_folder_in_an_object_store_follows_the_one_here(bucket, machine):
    place = within(bucket, "runs/one")
    folder, copy = working_folder(place, resume=False)
    copy()
    write(folder, SEALED)
    copy()
    write(
        folder, {"checkpoints/00002/state.safetensors": "t", "checkpoints/00002/facts.json": "g", "manifest.json": "n"}
    )
    shutil.rmtree(folder / "checkpoints" / "00001")
    copy()
    here = read(folder)
    machine()
    again, _ = working_folder(place, resume=True)
    assert read(again) == here and len(here) == len(SEALED)
    with pytest.raises(ValueError, match=r"runs/one.* already holds a run: choose another --out, or .* --resume"):
        working_folder(place, resume=False)
    with pytest.raises(ValueError, match=r"runs/two.* holds no run to resume"):
        working_folder(within(bucket, "runs/two"), resume=True)


def test_wherever_copying_is_cut_off_what_is_there_is_whole(tmp_path, machine, monkeypatch):
    """The second of two checkpoints replaces the first, and the model is trained anew; each step may be the last."""
    copy_files, remove, steps = mirror.fs.copy_files, Mirror._remove, [0]

    def counted(call):
        def limited(*arguments):
            steps[0] -= 1
            if steps[0] < 0:
                raise OSError("the network is gone")
            call(*arguments)

        return limited

    later = {name.replace("1", "2"): f"{text} later" for name, text in SEALED.items()}
    for allowed in range(40):
        place = (tmp_path / "there" / str(allowed)).as_uri()
        folder, copy = working_folder(place, resume=False)
        steps[0] = allowed
        with monkeypatch.context() as patched:
            patched.setattr(mirror.fs, "copy_files", counted(copy_files))
            patched.setattr(Mirror, "_remove", counted(remove))
            try:
                write(folder, SEALED)
                copy()
                shutil.rmtree(folder / "checkpoints" / "00001")
                write(folder, later)
                copy()
            except ValueError as error:
                assert "what was copied there before is complete" in str(error)
        ended = steps[0] >= 0
        machine()
        try:
            copied = read(working_folder(place, resume=True)[0])
        except ValueError as error:
            assert "no recipe.toml" in str(error) and allowed < len(SEALED)
            continue
        rounds = {name.split("/")[1] for name in copied if name.startswith("checkpoints/")}
        assert rounds
        for name in rounds:
            assert f"checkpoints/{name}/state.safetensors" in copied and f"checkpoints/{name}/facts.json" in copied
            assert f"metrics/round-{name}.parquet" in copied
        assert ("model/adapter.safetensors" in copied) == ("finished.json" in copied)
        assert "finished.json" not in copied or "report.html" in copied
        if ended:
            assert copied == later | {"metrics/round-00001.parquet": "1"}
            return
    raise AssertionError("copying never ended")


def test_what_the_run_has_not_written_is_neither_fetched_nor_removed(tmp_path, machine):
    place, foreign = tmp_path / "there", {".notes": "n", "model/.cache/x": "c", "checkpoints/00001/.keep": "k"}
    foreign |= {".ipynb_checkpoints/a.ipynb": "a", "checkpoints/.ipynb_checkpoints/b.ipynb": "b"}
    seen = {"checkpoints/read-me.txt": "r", "checkpoints/old/facts": "o", "thoughts.txt": "t", "checkpoints/7": "s"}
    folder, copy = working_folder(place.as_uri(), resume=False)
    write(folder, SEALED)
    copy()
    write(place, foreign | seen)
    (place / "finished.json").unlink()  # as a copy is left that was cut off
    machine()
    folder, copy = working_folder(place.as_uri(), resume=True)
    assert read(folder).keys() == (SEALED | seen).keys() - {"model/adapter.safetensors", "finished.json"}
    shutil.rmtree(folder / "checkpoints" / "00001")
    copy()
    rest = {name: text for name, text in SEALED.items() if name in read(folder)}
    assert read(place) == rest | foreign | seen
    with pytest.raises(ValueError, match="already holds a run"):
        working_folder(place.as_uri(), resume=False)


def test_a_folder_that_holds_no_more_than_hidden_files_is_not_empty(tmp_path, machine):
    write(tmp_path / "there", {".notes": "n"})
    with pytest.raises(ValueError, match="is not empty: choose another --out"):
        working_folder((tmp_path / "there").as_uri(), resume=False)


def test_what_the_run_removes_meanwhile_is_no_fault_and_nothing_older_goes(tmp_path, machine, monkeypatch):
    place = (tmp_path / "there").as_uri()
    folder, copy = working_folder(place, resume=False)
    write(folder, SEALED)
    copy()
    listed = mirror._linked

    def removed_first(root, names, scratch):
        shutil.rmtree(root / "checkpoints" / "00002")
        return listed(root, names, scratch)

    shutil.rmtree(folder / "checkpoints" / "00001")
    write(folder, {"checkpoints/00002/state.safetensors": "t", "checkpoints/00002/facts.json": "g"})
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "_linked", removed_first)
        copy()
    assert read(tmp_path / "there") == SEALED
    write(folder, {"checkpoints/00003/state.safetensors": "u", "checkpoints/00003/facts.json": "h"})
    copy()
    assert read(tmp_path / "there") == read(folder)
    assert [path.name for path in (tmp_path / "there" / "checkpoints").iterdir()] == ["00003"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, machine):
    (tmp_path / "file").write_text("")
    folder, copy = working_folder((tmp_path / "file" / "run").as_uri(), resume=False)
    write(folder, SEALED)
    with pytest.raises(ValueError, match=r"^file://.*/file/run cannot be written: .*; .* run again with --resume$"):
        copy()
    for secret in ("s3://me:secret@bucket/run", "abfs://c@a.dfs.core.windows.net/run?sv=1&sig=secret"):
        with pytest.raises(ValueError, match="holds a password"):
            working_folder(secret, resume=False)


START = """
import sys
from experiments.runs.mirror import working_folder
for resume in (False, True):
    try:
        working_folder(sys.argv[1], resume)
    except ValueError as error:
        print(error)
"""


def test_a_second_start_is_refused_before_it_touches_what_the_first_works_in(tmp_path, machine):
    place = (tmp_path / "there").as_uri()
    folder, copy = working_folder(place, resume=False)
    write(folder, SEALED)
    copy()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "node")}
    command = [sys.executable, "-c", START, place]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 2 and all(line.startswith("another command on this machine is working on") for line in said)
    copy()
    assert read(folder) == read(tmp_path / "there") == SEALED
    home = os.open(folder.parent, os.O_RDONLY)
    del copy  # as when the run has ended
    fcntl.flock(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(home)


def test_a_folder_that_a_cleaner_took_is_not_taken_for_one_that_the_run_emptied(tmp_path, machine):
    folder, copy = working_folder((tmp_path / "there").as_uri(), resume=False)
    write(folder, SEALED)
    copy()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"has been deleted: set TMPDIR to .* --resume; .* is complete$"):
        copy()
    assert read(tmp_path / "there") == SEALED


@pytest.mark.parametrize(("mode", "copied", "charged"), [("full", 3, 4), ("full", 0, 1), ("ideal", 3, 3)])
def test_noise_that_may_have_been_drawn_since_the_account_was_copied_is_charged(
    small_recipe, tmp_path, machine, mode, copied, charged
):
    """The last checkpoint is of round 2, if there is any, and one more round is played."""
    dp = "privacy.dp={kind='distributed', noise_multiplier=2.0, delta=1e-3}"
    recipe = small_recipe(dp, f"privacy.secagg.mode='{mode}'", "strategy={kind='fedavg', weighting='uniform'}")
    there = tmp_path / "there"
    folder, copy = working_folder(there.as_uri(), resume=False)
    write(folder, SEALED | {"recipe.toml": to_toml(recipe)})

    def charge(round_):
        account = PrivacyAccount.open(recipe, Layout(("w",), ((3,),)), folder, np.full(100, 4), 3, round_)
        account.charge()
        return account.charged

    for round_ in range(copied):
        charge(round_)
    copy()
    total = 0
    for again in (1, 2):  # of the second part nothing but its beginning is copied either
        machine()
        folder, copy = working_folder(there.as_uri(), resume=True)
        copy()
        total = charge(min(2, copied))
        assert total == charged + again * AHEAD if mode == "full" else total == charged
    copy()
    assert json.loads((there / "privacy.json").read_text())["rounds"] == total


@pytest.mark.slow
def test_a_run_at_a_uri_goes_on_on_another_machine(ray_session, small_recipe, tmp_path, machine, full):
    dp = "privacy.dp={kind='central', noise_multiplier=1.0, delta=1e-3}"
    recipe = small_recipe("rounds=3", "checkpoint.keep=1", dp, "strategy={kind='fedavg', weighting='uniform'}")
    there = tmp_path / "there"

    class CutOff(Exception):
        pass

    def cut_off(event):
        if isinstance(event, RoundDone) and event.round == 1:
            time.sleep(2)  # a slow network: the driver could play all rounds
            [account] = (tmp_path / "node").rglob("privacy.json")
            assert json.loads(account.read_text())["rounds"] <= AHEAD
        if isinstance(event, RoundDone) and event.round == 2:
            raise CutOff

    with pytest.raises(CutOff):
        experiments.run(recipe, out=there.as_uri(), on_event=cut_off)
    assert (there / "recipe.toml").exists() and not (there / "model").exists()
    machine()
    events = []
    run = experiments.run(recipe, out=there.as_uri(), resume=True, on_event=events.append)
    assert next(event.resumed for event in events if isinstance(event, Started)) in (1, 2)
    assert digests(there) == digests(run.folder) and (there / "report.html").exists()
    machine()
    with pytest.raises(ValueError, match="has finished"):
        experiments.run(recipe, out=there.as_uri(), resume=True)
    if full:
        plain = experiments.run(recipe, out=tmp_path / "plain")
        adapter = "model/adapter_model.safetensors"
        assert (there / adapter).read_bytes() == (plain.folder / adapter).read_bytes()


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
