"""Whole runs below "weights" on real Ray: same bits, killed providers, exposure, money, a slot's memory."""

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass, replace
from typing import ClassVar

import psutil
import pyarrow.compute as pc
import pytest
import ray.cloudpickle
from safetensors.numpy import load_file

import experiments
from engine.messages.errors import RunError
from engine.messages.events import RoundDone
from engine.records.metrics import read_log
from engine.rounds.provider_terms import ANSWERS
from experiments.runs.driving import RunStopped
from strategies.black_box.cma_search import CmaSearch
from tests.experiments.privacy.test_blind_driver import private_memory

SHORT = ("rounds=2", "cohort.size=4", "evaluate.every=1", "evaluate.rows=4", "train.steps=1", "train.batch=4")
WORDS = ("strategy={kind='words', mutants=3}", "model.peft={kind='words', n=3}")
KINDS = {
    "words": ("api_logprobs", *WORDS),
    "cma": ("api_embeddings", "strategy={kind='cma', population=4}", "model.peft={kind='projected', n=3, d=4}"),
    "fedbpt": (
        "api_embeddings",
        "strategy={kind='fedbpt', population=4, generations=2}",
        "model.peft={kind='projected', n=3, d=4}",
    ),
    "prompt": ("api_gradients", "model.peft={kind='prompt', n=3}"),
    "ends": ("emulator", "model.peft={kind='ends', middle='all'}"),
}
# All weights are in the slot, and none of them moves.
STILL = ("rounds=1", "evaluate.every=0", "model.peft=none", "train.optimizer={kind='sgd', lr=0.0}")
PRICED = "model.access.price={input=1.0, output=2.0, per=1000}"


@pytest.fixture(scope="module")
def access_recipe(small_recipe):
    def make(name, *changes, home=False):
        level, *pair = KINDS[name]
        access = [] if home else [f"model.access.level={level}"]
        return small_recipe(*SHORT, *pair, *access, *changes)

    return make


@pytest.fixture(scope="module")
def windows(tiny_base):
    """Parts of 64 bytes of the base's matrices."""
    (weights,) = tiny_base.glob("*.safetensors")
    matrices = [tensor.tobytes() for tensor in load_file(weights).values() if tensor.ndim == 2]
    return [each[place : place + 64] for each in matrices for place in (0, len(each) // 2 // 64 * 64)]


@pytest.fixture(scope="module")
def look(tiny_base, windows):
    """Makes what looks into slots after a round: how many windows their memory has, and if it has the base's path."""

    def made(seen):
        def at(event):
            if isinstance(event, RoundDone) and not seen:
                slots = [p for p in psutil.Process().children(recursive=True) if "ClientActor" in "".join(p.cmdline())]
                memory = [part for slot in slots for part in private_memory(slot.pid)]
                assert memory
                seen.append(sum(any(window in part for part in memory) for window in windows))
                seen.append(any(str(tiny_base).encode() in part for part in memory))

        return at

    return made


@pytest.fixture(scope="module")
def sealed(ray_session, access_recipe, look, tmp_path_factory):
    """A run of each kind in one slot, made when it is first asked for; `seen` is what its slot's memory had."""
    runs, seen = {}, {}

    def run(name):
        if name not in runs:
            see = look(seen.setdefault(name, [])) if sys.platform.startswith("linux") else lambda event: None
            folder = tmp_path_factory.mktemp(name) / "run"
            runs[name] = experiments.run(access_recipe(name, PRICED), out=folder, on_event=see)
        return runs[name]

    run.seen = seen
    return run


def learned(run):
    """What a run has learned, and its losses."""
    if (run.folder / "recipe.toml").read_text().count("ends"):
        (checkpoint,) = sorted((run.folder / "checkpoints").iterdir())[-1:]
        return load_file(checkpoint / "state.safetensors")["params"].tolist(), run.losses
    if (run.model / "prompt.json").exists():
        return json.loads((run.model / "prompt.json").read_text()), run.losses
    return load_file(run.model / "adapter_model.safetensors")["prompt_embeddings"].tolist(), run.losses


def exposure(run):
    return read_log(run.folder / "exposure")


def providers():
    replicas = [p for p in psutil.Process().children(recursive=True) if "ray::Provider" in "".join(p.cmdline())]
    return sorted(replicas, key=lambda process: process.create_time())


@pytest.mark.parametrize("name", KINDS)
def test_the_owner_of_the_base_changes_no_bit(sealed, access_recipe, tmp_path, name, full):
    """At home, and on other slots, the run learns the same to the bit."""
    if name != "words" and not full:
        pytest.skip("one kind is tried unless all are asked for")
    home = experiments.run(access_recipe(name, "clients.slots=2", home=True), out=tmp_path / "home")
    if name == "ends":  # an emulator of the whole middle is the base: both are judged alike, to the bit
        assert home.losses["end"] == home.losses["emulator"]
    assert learned(home) == learned(sealed(name))
    assert not (home.folder / "exposure").exists()
    for slots in (2, 3) if full else ():
        run = experiments.run(access_recipe(name, PRICED, f"clients.slots={slots}"), out=tmp_path / f"{slots}")
        assert learned(run) == learned(sealed(name))
        assert name == "ends" or exposure(run).equals(exposure(sealed(name)))


@pytest.mark.parametrize("name", ["words", "cma"])
def test_a_killed_provider_and_a_stop_change_no_bit(sealed, access_recipe, tmp_path, name, full):
    if not full:
        pytest.skip("takes long: only the full tests kill providers")
    stop, killed = threading.Event(), []

    def kill(event):
        if isinstance(event, RoundDone) and not killed:
            killed.append(providers()[-1].pid)
            os.kill(killed[0], signal.SIGKILL)
            stop.set()

    recipe = access_recipe(name, PRICED, "rounds=3")
    whole = experiments.run(recipe, out=tmp_path / "whole")
    with pytest.raises(RunStopped):
        experiments.run(recipe, out=tmp_path / "run", on_event=kill, stop=stop)
    again = experiments.run(recipe, out=tmp_path / "run", resume=True)
    assert killed and learned(again) == learned(whole)
    faults = read_log(again.folder / "faults").to_pylist() if (again.folder / "faults").exists() else []
    assert all(fault["kind"] in ("slot", "driver") for fault in faults)


def test_rows_tokens_and_money_to_the_cent(sealed, full):
    if not full:
        pytest.skip("takes long: units of it are tried by themselves")
    run = sealed("cma")
    rows, metrics = exposure(run), read_log(run.folder / "metrics")
    # Four candidates are scored on each row of a step, of which a client has four, or all that it has.
    numbers = [row for each in rows["numbers"].to_pylist() for row in each]
    assert len(rows) == 2 * 4 and 2 * 4 * 3 <= len(numbers) <= 2 * 4 * 4
    assert pc.sum(rows["rows"]).as_py() == 4 * len(numbers)
    tokens = sum(
        row["value"]
        for row in metrics.to_pylist()
        if (row["split"], row["name"]) == ("train", "tokens") and row["client"]
    )
    read = 4 * (tokens + 3 * len(numbers))  # each candidate is three vectors in front of each row
    assert pc.sum(rows["tokens"]).as_py() == read
    assert pc.sum(rows["cost"]).as_py() == pytest.approx(read / 1000, abs=0.005)
    assert pc.sum(rows["new_rows"]).as_py() <= sum(len(set(each)) for each in rows["numbers"].to_pylist())
    assert set(rows["kind"].to_pylist()) == {"vector"}
    ledger = read_log(run.folder / "ledger").to_pylist()
    to_owner = [row for row in ledger if row["party"] == "base-model owner"]
    assert sum(row["count"] for row in to_owner) == 8
    assert sum(row["bytes"] for row in to_owner) == pc.sum(rows["bytes"]).as_py()


def test_money_that_runs_out_ends_the_run_and_more_continues_it(sealed, access_recipe, tmp_path, full):
    if not full:
        pytest.skip("takes long: units of it are tried by themselves")
    whole = sealed("words")
    cost = pc.sum(exposure(whole)["cost"]).as_py()
    with pytest.raises(RunError, match=r"the calls of 1 rounds have cost .* USD, and model\.access\.max_cost is 0\.01"):
        experiments.run(access_recipe("words", PRICED, "model.access.max_cost=0.01"), out=tmp_path / "run")
    more = access_recipe("words", PRICED, f"model.access.max_cost={2 * cost}")
    again = experiments.run(more, out=tmp_path / "run", resume=True)
    assert learned(again) == learned(whole)
    assert exposure(again).equals(exposure(whole))


def test_a_provider_that_changes_is_noticed_and_one_that_leaves_ends_the_run(access_recipe, tiny_base, tmp_path, full):
    if not full:
        pytest.skip("takes long: units of it are tried by themselves")
    events = "model.access.events=[{round=2, kind='jitter', nats=0.5}, {round=3, kind='remove'}]"
    with pytest.raises(RunError, match="the provider removed the base in round 3"):
        experiments.run(access_recipe("words", "rounds=4", events), out=tmp_path / "run")
    (fault,) = [row for row in read_log(tmp_path / "run" / "faults").to_pylist() if row["kind"] == "provider"]
    assert fault["round"] == 2
    assert fault["why"] == "the provider changed: from round 2 on it answers the same public tokens otherwise"
    assert json.loads((tmp_path / "run" / ANSWERS).read_text())["round"] == 2
    assert any((tmp_path / "run" / "checkpoints").iterdir())


@dataclass(frozen=True)
class Claims(CmaSearch):
    """Says that scores of words will do, and sends vectors."""

    kind: str = "claims"  # type: ignore[assignment]
    population: int = 4
    access: ClassVar[frozenset[str]] = frozenset({"score"})


def test_a_false_declaration_ends_at_the_provider(ray_session, access_recipe, tmp_path):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        honest = access_recipe("cma")
        recipe = replace(
            honest,
            strategy=Claims(),
            model=replace(honest.model, access=replace(honest.model.access, level="api_logprobs")),
        )
        with pytest.raises(RunError, match='a client asked for "inject", which the level "api_logprobs"'):
            experiments.run(recipe, out=tmp_path / "run")
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    (fault,) = [row for row in read_log(tmp_path / "run" / "faults").to_pylist() if row["kind"] == "access"]
    assert fault["who"] == "the strategy 'Claims'"


def test_sums_under_masks_are_the_sums(ray_session, access_recipe, tmp_path, full):
    """full = ideal bit for bit."""
    if not full:
        pytest.skip("takes long: units of it are tried by themselves")
    secure = (
        "privacy.secagg={dropout=0.34, threshold=2, bounds={nll=10000.0, learned=1000.0}}",
        "privacy.rows_cap=4",
    )
    runs = [
        experiments.run(access_recipe("cma", *secure, f"privacy.secagg.mode={mode}"), out=tmp_path / mode)
        for mode in ("full", "ideal")
    ]
    assert learned(runs[0]) == learned(runs[1])
    assert exposure(runs[0]).equals(exposure(runs[1]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_slot_has_a_window_of_the_base_in_its_memory(sealed, small_recipe, look, tmp_path, full):
    for name in ("words", "cma", "prompt") if full else ("words",):
        sealed(name)
        assert sealed.seen[name] == [0, False]
    if full:  # control: a slot that trains all weights has copies of them
        seen = []
        experiments.run(small_recipe(*SHORT, *STILL), out=tmp_path / "home", on_event=look(seen))
        windows_at_home, path_at_home = seen
        assert windows_at_home > 0 and path_at_home


def test_scalars_have_the_same_bits_on_other_slots_and_under_masks(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("takes long: its parts are tried by themselves")
    scalars = (
        *SHORT,
        "strategy=fedkseed",
        "model.peft={kind='seeds', candidates=16}",
        "train.optimizer={kind='sgd', lr=1e-3}",
        "train.steps=4",
        "rounds=3",
    )
    stop, folder = threading.Event(), tmp_path / "stopped"

    def after_the_first_round(event):
        if isinstance(event, RoundDone):
            stop.set()

    def vector(run):
        return json.loads((run.model / "seeds.json").read_text()), run.losses

    plain = experiments.run(small_recipe(*scalars), out=tmp_path / "1")
    assert vector(plain)[0]["amounts"] and plain.losses["end"] != plain.losses["round 0"]
    with pytest.raises(RunStopped):
        experiments.run(small_recipe(*scalars), out=folder, on_event=after_the_first_round, stop=stop)
    assert vector(experiments.run(small_recipe(*scalars, "clients.slots=2"), out=folder, resume=True)) == vector(plain)
    secure = ("privacy.secagg={dropout=0.34, threshold=2, bound=0.5}", "privacy.rows_cap=4")
    full_mode, ideal = (
        experiments.run(small_recipe(*scalars, *secure, f"privacy.secagg.mode={mode}"), out=tmp_path / mode)
        for mode in ("full", "ideal")
    )
    assert vector(full_mode) == vector(ideal)
