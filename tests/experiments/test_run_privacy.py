"""Whole private runs: what is written, what ends them, and that the driver never holds what it must not see."""

import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pyarrow.compute as pc
import pytest
import ray.cloudpickle
import torch

import experiments
from engine.events import RoundDone, Started
from engine.metrics import read_log
from engine.ring import ring_sums
from strategies.fedavg import FedAvg
from strategies.layout import Layout
from strategies.seeds import rng

FULL = "privacy.secagg.mode=full"
UNIFORM = "strategy={kind='fedavg', weighting='uniform'}"
WORDS = 16


def values(run, name, split):
    rows = run.metrics.filter(pc.equal(run.metrics["name"], name)).to_pylist()
    return [row["value"] for row in rows if row["split"] == split and row["client"] is None]


def test_a_private_run_says_what_it_cost_and_who_saw_what(ray_session, small_recipe, tmp_path):
    events = []
    dp = "privacy.dp={kind='distributed', noise_multiplier=0.5, clip=0.2, delta=0.01}"
    changes = (FULL, UNIFORM, dp, "rounds=2", "evaluate.every=0")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    said = [event.epsilon for event in events if isinstance(event, RoundDone)]
    assert all("for one client (zero out one), without amplification" in epsilon for epsilon in said)
    epsilons = values(run, "epsilon", "privacy")
    assert 0 < epsilons[0] < epsilons[1] and values(run, "delta", "privacy") == [0.01] * 2
    privacy = json.loads((run.folder / "privacy.json").read_text())
    assert privacy["epsilon"] == epsilons[1] and privacy["statement"] == said[-1] and "simulated" not in said[-1]

    ledger = read_log(run.folder / "ledger").to_pylist()
    seen = {(row["party"], row["kind"]) for row in ledger}
    assert ("server", "masked update") in seen and ("other clients", "share") in seen
    assert not {kind for party, kind in seen if party == "server"} & {"update", "metric", "rows"}
    assert {row["mode"] for row in ledger} == {"full"}
    # The server learns no client's figures, the metrics know of a round's clients only together.
    train = run.metrics.filter(pc.equal(run.metrics["split"], "train")).to_pylist()
    assert {row["client"] for row in train} == {None} and {row["name"] for row in train} == {"loss", "tokens"}
    assert str(privacy["epsilon"])[:4] in (run.model / "README.md").read_text()


def test_what_comes_without_privacy_is_the_run_without_privacy(ray_session, small_recipe, tmp_path):
    private = ("privacy.secagg.mode=ideal", "privacy.dp={kind='adaptive', noise_multiplier=0.1}")
    changes = (UNIFORM, "rounds=2", "evaluate.every=0")
    recipe = small_recipe(*changes, *private, "evaluate.without_privacy=true")
    run = experiments.run(recipe, out=tmp_path / "run")
    plain = experiments.run(small_recipe(*changes), out=tmp_path / "plain")
    assert run.losses["not private"] == plain.losses["end"] != run.losses["end"]
    clips = values(run, "clip", "privacy")
    assert clips[0] == 0.1 and clips[1] != 0.1


def test_an_aborted_round_leaves_the_model_and_what_clients_know(ray_session, small_recipe, tmp_path):
    events = []
    changes = ["strategy=scaffold", "train.optimizer={kind='sgd', lr=0.1}", "privacy.secagg.bounds={c=1.0}", FULL]
    changes += ["clients.availability.dropout=0.95", "privacy.secagg.max_aborts=2", "rounds=5", "evaluate.every=1"]
    with pytest.raises(ValueError, match=r"3 rounds had no result, more than privacy\.secagg\.max_aborts = 2 allows"):
        experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    done = [event for event in events if isinstance(event, RoundDone)]
    assert [event.clients for event in done] == [0, 0] and all(event.aborted for event in done)
    metrics = read_log(tmp_path / "run" / "metrics").to_pylist()
    held = [row for row in metrics if (row["name"], row["split"], row["client"]) == ("loss", "heldout", None)]
    assert len({row["value"] for row in held}) == 1 and len(held) == 3
    assert not list((tmp_path / "run" / "memory").rglob("*.safetensors"))


def test_a_deadline_that_nobody_meets_moves_nothing(ray_session, small_recipe, tmp_path):
    events = []
    changes = ("clients.availability.deadline_s=1e-6", "rounds=1")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    (done,) = (event for event in events if isinstance(event, RoundDone))
    assert (done.clients, done.dropped, done.failed) == (0, 5, {})
    assert run.losses["end"] == run.losses["round 0"]


def test_a_warning_about_delta_is_shown(ray_session, small_recipe, tmp_path):
    events = []
    changes = (UNIFORM, "privacy.dp={kind='central', noise_multiplier=1.0, delta=0.4}", "rounds=1", "evaluate.every=0")
    experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    (started,) = (event for event in events if isinstance(event, Started))
    assert "delta = 0.4 is above 1 / 8" in started.notes[0]


@dataclass(frozen=True)
class Canary(FedAvg):
    """FedAvg whose clients put 16 numbers of their own into their change, and write them down where the test looks."""

    kind: str = "canary"  # type: ignore[assignment]
    weighting: str = "uniform"  # type: ignore[assignment]
    folder: str = ""
    seen: ClassVar[list[torch.Tensor]] = []

    def finish(self, update, got, memory, ends=None):
        update, memory = super().finish(update, got, memory, ends)
        canary = torch.from_numpy(np.frombuffer(os.urandom(2 * WORDS), np.int16) / 2.0**17).float()
        np.save(Path(self.folder) / f"{update.client}.npy", canary.numpy())
        return replace(update, delta=torch.cat([canary, update.delta[WORDS:]])), memory

    def apply(self, state, aggregate):
        self.seen.append(aggregate.total)  # stays in the driver as long as its process
        return super().apply(state, aggregate)


@pytest.fixture
def canaries(ray_session, small_recipe, tmp_path):
    """Runs a round in two slots; gives the recipe, the canaries by client, and what is in the driver's memory then."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def play(*changes):
        recipe = small_recipe("rounds=1", "clients.slots=2", "evaluate.every=0", *changes)
        folder = tmp_path / recipe.privacy.secagg.mode
        folder.mkdir()
        recipe, memories = replace(recipe, strategy=Canary(folder=str(folder))), []

        def look(event):
            if isinstance(event, RoundDone):
                memories.append(memory_of("ray::Driver"))

        experiments.run(recipe, out=folder / "run", on_event=look)
        return recipe, {int(path.stem): np.load(path) for path in folder.glob("*.npy")}, memories[0]

    yield play
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def memory_of(name):
    """All readable memory of the child process of that name that is not shared with others."""
    content = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name not in "".join(process.cmdline()):
                continue
            with open(f"/proc/{process.pid}/maps") as maps, open(f"/proc/{process.pid}/mem", "rb", 0) as memory:
                for line in maps:
                    first, last, access = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
                    if access.startswith("rw") and "/dev/shm" not in line:
                        content.append(region(memory, int(first, 16), int(last, 16)))
    assert content
    return content


def region(memory, first, last):
    """The bytes between two addresses, in as many reads as it takes."""
    parts = []
    while first < last:
        memory.seek(first)
        try:
            part = memory.read(min(last - first, 2**24))
        except OSError:  # a page that cannot be read, such as a stack's guard
            part = b""
        parts.append(part or bytes(4096))
        first += len(parts[-1])
    return b"".join(parts)


def found(memory, needle):
    return any(needle in part for part in memory)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_driver_never_holds_an_unmasked_update(canaries):
    # Control: in the clear, the sum of one client with the weight 1 is its update, and it is found.
    _, planted, memory = canaries("cohort.size=1")
    (canary,) = planted.values()
    assert found(memory, canary.tobytes())

    recipe, planted, memory = canaries("cohort.size=2", FULL)
    assert len(planted) == 2
    sums = ring_sums(recipe, Layout(("w",), ((WORDS,),)), None, 0.0, 2, 3 * 4 * 48)
    encoded = []
    for client, canary in planted.items():
        encoded.append(sums.encode_part("delta", canary, 1.0, rng(recipe.seed, 0, client, "rounding")))
        exact = np.rint(canary.astype(np.float64) * 2.0**40).astype(np.int64)
        for needle in (canary, canary.astype(np.float64), exact, encoded[-1]):
            assert not found(memory, needle.tobytes())
            assert not found(memory, needle[: WORDS // 2].tobytes())
    # What it does have is the sum of both.
    total = sums.decode_part("delta", encoded[0] + encoded[1]).astype(np.float32)
    assert found(memory, total.tobytes())
