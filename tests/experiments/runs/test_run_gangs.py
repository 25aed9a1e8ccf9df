"""Whole runs with gangs: where the same run with plain slots leads, whoever dies, and after an interruption."""

import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import ray.cloudpickle
import torch
from safetensors.torch import load_file

import experiments
from engine.messages.events import DriverLost, RoundDone, Started
from engine.records.metrics import read_log
from strategies.averaging.fedavg import FedAvg

ADAPTER = "adapter_model.safetensors"
ZERO = "clients.zero={stage=3, ranks=2, timeout_s=15}"
ADAMW = "train.optimizer={kind='adamw', lr=2e-3, eps=1e-6}"
SMALL = ("clients.slots=1", "rounds=3", "cohort.size=3", "evaluate.every=0", ADAMW)


def weights(run, file=ADAPTER):
    return load_file(run.model / file)


def apart(first, second):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def reference(ray_session, small_recipe, tmp_path_factory):
    """A run with gangs that nothing has happened to."""
    return experiments.run(small_recipe(*SMALL, ZERO), out=tmp_path_factory.mktemp("gangs") / "run")


def test_gangs_lead_where_plain_slots_do(reference, small_recipe, tmp_path):
    plain = experiments.run(small_recipe(*SMALL), out=tmp_path / "run")
    assert apart(reference, plain) < 1e-5
    for when in ("round 0", "end"):
        assert reference.losses[when] == pytest.approx(plain.losses[when], abs=1e-5)


@pytest.mark.slow
def test_gangs_begin_where_an_earlier_run_ended(reference, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("two runs; plain slots are tried")
    start = f"model.start='{reference.folder}'"
    run = experiments.run(small_recipe(*SMALL, ZERO, start, "rounds=1"), out=tmp_path / "run")
    assert run.losses["round 0"] == reference.losses["end"] != reference.losses["round 0"]


def test_a_dead_drivers_gangs_leave_their_places_to_the_next_ones(reference, small_recipe, tmp_path):
    """The two ranks take all of Ray's six CPUs: what the first driver's gang had is what there is."""
    events = []

    def disturb(event):
        events.append(type(event))
        if isinstance(event, RoundDone) and DriverLost not in events:
            (driver,) = (
                process
                for process in psutil.Process().children(recursive=True)
                if "ray::Driver" in "".join(process.cmdline()[:1])
            )
            driver.kill()

    run = experiments.run(small_recipe(*SMALL, ZERO, "clients.num_cpus=3"), out=tmp_path / "run", on_event=disturb)
    assert events.count(DriverLost) == 1
    assert (run.model / ADAPTER).read_bytes() == (reference.model / ADAPTER).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "fedadam", "diloco"])
def test_rules_in_shards_are_the_rules(ray_session, small_recipe, tmp_path, full, strategy):
    if not full:
        pytest.skip("a secured run with SCAFFOLD is tried unless all are asked for")
    optimizer = "train.optimizer={kind='sgd', lr=0.1}"
    changes = [*SMALL, "model.peft=none", f"strategy={strategy}", optimizer, "cohort.size=8"]
    gangs, plain = (
        experiments.run(small_recipe(*changes, *more), out=tmp_path / name)
        for name, more in (("gangs", ["clients.zero={stage=2, ranks=2}"]), ("plain", []))
    )
    ours = {key: value for file in gangs.model.glob("model-*.safetensors") for key, value in load_file(file).items()}
    theirs = weights(plain, "model.safetensors")
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours) and ours
    assert gangs.losses["end"] == pytest.approx(plain.losses["end"], abs=1e-5)
    assert gangs.losses["end"]["heldout"] < gangs.losses["round 0"]["heldout"]


def test_a_whole_model_from_gangs_loads_with_transformers(ray_session, small_recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    changes = ("model.peft=none", "rounds=1", "train.optimizer={kind='sgd', lr=0.5}", "clients.slots=1", ZERO)
    run = experiments.run(small_recipe(*changes, "evaluate.every=0"), out=tmp_path / "run")
    model, loading = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    saved = {key: value for file in run.model.glob("model-*.safetensors") for key, value in load_file(file).items()}
    assert all(torch.equal(model.get_parameter(name), value) for name, value in saved.items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_secured_shards_are_the_secured_vector(ray_session, small_recipe, tmp_path, full, strategy):
    if not full:
        pytest.skip("most of a minute: gangs in the clear, and secured runs in plain slots, are tried beside it")
    sgd = "train.optimizer={kind='sgd', lr=0.1}"
    bounds = ("privacy.secagg.bounds={c=1.0}",) if strategy == "scaffold" else ()
    changes = (
        *SMALL,
        f"strategy={strategy}",
        sgd,
        "rounds=2",
        "privacy.rows_cap=20",
        "privacy.secagg.mode=full",
        *bounds,
    )
    gangs = experiments.run(small_recipe(*changes, ZERO), out=tmp_path / "gangs")
    plain = experiments.run(small_recipe(*changes), out=tmp_path / "plain")
    assert apart(gangs, plain) < 1e-5
    assert gangs.losses["end"] == pytest.approx(plain.losses["end"], abs=1e-5)
    seen = {(row["party"], row["kind"]) for row in read_log(gangs.folder / "ledger").to_pylist()}
    assert ("server", "masked update") in seen and ("server", "update") not in seen


@pytest.mark.slow
def test_clipping_and_central_noise_are_of_the_whole_vector(ray_session, small_recipe, tmp_path, full):
    uniform = "strategy={kind='fedavg', weighting='uniform'}"
    noise = "privacy.dp={kind='central', noise_multiplier=1e-9, clip=0.01, delta=0.1}"
    if not full:
        pytest.skip("four runs")
    for name, change in (("noise", noise), ("clip", "transforms=[{kind='clip', bound=0.01}]")):
        changes = (*SMALL, uniform, "rounds=1", change)
        gangs = experiments.run(small_recipe(*changes, ZERO), out=tmp_path / name)
        assert apart(gangs, experiments.run(small_recipe(*changes), out=tmp_path / f"{name}-plain")) < 1e-5


@pytest.mark.slow
def test_small_clients_may_have_plain_slots(reference, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("a whole run more")
    mixed = "clients.zero={stage=3, ranks=2, timeout_s=20, from_rows=12}"
    run = experiments.run(small_recipe(*SMALL, mixed), out=tmp_path / "run")
    assert 0 < apart(run, reference) < 1e-5  # some were trained in one process, which rounds otherwise
    assert run.losses["end"] == pytest.approx(reference.losses["end"], abs=1e-5)


@pytest.mark.slow
def test_sums_shorter_than_the_update_are_whole_in_all_ranks(ray_session, small_recipe, tmp_path, full):
    """FedNova's two numbers, of gangs alone and of gangs beside plain slots."""
    if not full:
        pytest.skip("three runs; the sums by themselves are tried")
    epoch = "train={epochs=1, batch=4, max_length=48, optimizer={kind='sgd', lr=0.1}}"  # whose steps rows tell
    nova = ("strategy=fednova", epoch, "rounds=2", "cohort.size=8")
    plain = experiments.run(small_recipe(*SMALL, *nova), out=tmp_path / "plain")
    for name, more in (("gangs", ""), ("mixed", ", from_rows=12")):
        zero = f"clients.zero={{stage=3, ranks=2, timeout_s=20{more}}}"
        run = experiments.run(small_recipe(*SMALL, *nova, zero), out=tmp_path / name)
        assert apart(run, plain) < 1e-5
        assert run.losses["end"] == pytest.approx(plain.losses["end"], abs=1e-5)
        assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"]


class Stop(Exception):
    """The test's own interruption."""


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_shards(reference, small_recipe, tmp_path, full):
    """Before it is interrupted, the first rank of its gang is stopped, which is noticed by its silence."""
    if not full:
        pytest.skip("a minute; gangs of a dead driver are tried")
    before, lost = set(ranks("Gang")), []

    def stop(event):
        if isinstance(event, RoundDone) and event.round == 1:
            lost.extend(set(ranks("Gang")) - before)
            os.kill(lost[0].pid, signal.SIGSTOP)
        if isinstance(event, RoundDone) and event.round == 2:
            raise Stop

    out, events = tmp_path / "run", []
    with pytest.raises(Stop):
        experiments.run(small_recipe(*SMALL, ZERO), out=out, on_event=stop)
    assert len(lost) == 1 and not lost[0].is_running()
    newest = sorted((out / "checkpoints").iterdir())[-1]
    assert {path.name for path in newest.iterdir()} == {
        "facts.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    }
    run = experiments.run(small_recipe(*SMALL, ZERO), out=out, resume=True, on_event=events.append)
    assert next(event for event in events if isinstance(event, Started)).resumed >= 1
    assert weights(run).keys() == weights(reference).keys() and apart(run, reference) == 0
    with pytest.raises(ValueError, match="has finished"):
        experiments.run(small_recipe(*SMALL, ZERO), out=out, resume=True)


@dataclass(frozen=True)
class Raising(FedAvg):
    """FedAvg of which one rank raises once, at the end of one client's work."""

    folder: str = ""

    def finish(self, update, broadcast, memory, ends):
        """As FedAvg's, but for the first time that anybody comes here in the second round."""
        if broadcast.round == 1:
            with suppress(FileExistsError):
                (Path(self.folder) / "raised").touch(exist_ok=False)
                raise ArithmeticError("its rows add up to nothing")
        return super().finish(update, broadcast, memory, ends)


@pytest.mark.slow
def test_what_a_client_raises_ends_its_gang_and_not_the_run(reference, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("a rank that is lost is tried")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    recipe = replace(small_recipe(*SMALL, ZERO), strategy=Raising(folder=str(tmp_path)))
    run = experiments.run(recipe, out=tmp_path / "run")
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert apart(run, reference) == 0
    ((kind, why),) = {(row["kind"], row["why"]) for row in read_log(run.folder / "faults").to_pylist()}
    assert kind == "slot" and "ArithmeticError: its rows add up to nothing" in why


def ranks(title):
    """The living ranks of that name: `Gang` is the first of a gang, `Rank` another one."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if f"ray::{title}" in "".join(process.cmdline()):
                processes.append(process)
    return processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "sent"), [("Rank", signal.SIGKILL), ("Gang", signal.SIGSTOP), ("Rank", signal.SIGSTOP)]
)
def test_a_gang_that_loses_a_rank_is_made_anew_and_no_bit_changes(reference, small_recipe, tmp_path, full, title, sent):
    if not full:
        pytest.skip("one loss is tried before an interruption unless all are asked for")
    before, lost = set(ranks(title)), []

    def lose(event):
        if isinstance(event, RoundDone) and event.round == 1:
            (process,) = set(ranks(title)) - before
            os.kill(process.pid, sent)
            lost.append(process)

    run = experiments.run(small_recipe(*SMALL, ZERO), out=tmp_path / "run", on_event=lose)
    assert lost and not lost[0].is_running()
    assert apart(run, reference) == 0
    facts = json.loads((sorted((run.folder / "checkpoints").iterdir())[-1] / "facts.json").read_text())
    assert facts["round"] == 3


def test_baselines_are_refused_before_anything_starts(small_recipe, tmp_path):
    with pytest.raises(ValueError, match="--baselines trains in one process"):
        experiments.run(small_recipe(ZERO), out=tmp_path / "run", baselines=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("strategy=median", "median' needs whole vectors, and ranks of a gang have shards"),
        ("transforms=[{kind='int8'}]", "transforms of another kind than clip does not work with gangs"),
        ("train.state=keep", "train.state = .keep. does not work with gangs"),
        ("clients.num_gpus=0.5", r"clients\.num_gpus = 0\.5 lets ranks of a gang share a GPU"),
    ],
)
def test_what_gangs_cannot_do_is_refused_at_once(small_recipe, change, message):
    with pytest.raises(ValueError, match=message):
        small_recipe(ZERO, change)
