"""Slots that are killed in the midst of a round, between one client and the next: what they had done is done again."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray.cloudpickle

import experiments
from engine.messages.events import RoundDone
from strategies.averaging.drift import Scaffold
from strategies.averaging.fedavg import FedAvg

ADAPTER = "adapter_model.safetensors"
QUIET = ("evaluate.every=0", "rounds=3", "cohort.size=8", "clients.slots=1")


@pytest.fixture(autouse=True)
def own_classes_travel():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def bits(run):
    return (run.model / ADAPTER).read_bytes()


def faults(run):
    """What the run has written down of what went wrong: round, kind, who, why."""
    paths = sorted((run.folder / "faults").glob("*.parquet"))
    return [tuple(row[key] for key in ("round", "kind", "who", "why")) for p in paths for row in read(p)]


def read(path):
    return pq.read_table(path).to_pylist()


@dataclass(frozen=True)
class Waiting(FedAvg):
    """FedAvg whose second client of the second round waits, the first time, for the end of its process."""

    folder: str = ""

    def finish(self, update, broadcast, memory, ends):
        """As FedAvg's."""
        if broadcast.round == 1:
            strike, began = Path(self.folder) / "strike", Path(self.folder) / "done"
            if began.exists() and not strike.exists():
                strike.with_suffix(".new").write_text(str(os.getpid()))
                strike.with_suffix(".new").rename(strike)
                time.sleep(60)
            with began.open("a") as file:
                file.write(f"{update.client}\n")
        return super().finish(update, broadcast, memory, ends)


def test_a_slot_killed_between_two_clients_of_a_round_changes_no_bit(ray_session, small_recipe, tmp_path):
    undisturbed = experiments.run(small_recipe(*QUIET), out=tmp_path / "undisturbed")
    strike, over = tmp_path / "strike", threading.Event()

    def kill():
        while not strike.exists() and not over.wait(0.01):
            pass
        os.kill(int(strike.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        recipe = replace(small_recipe(*QUIET), strategy=Waiting(folder=str(tmp_path)))
        run = experiments.run(recipe, out=tmp_path / "run")
    finally:
        over.set()
        killer.join()
    ((round_, kind, _, why),) = faults(run)
    assert (round_, kind) == (2, "slot") and "process has died" in why
    first, *others = (tmp_path / "done").read_text().split()
    assert len(set(others)) == len(others) == 8 and first in others  # it was in the sum that died
    assert bits(run) == bits(undisturbed)


@dataclass(frozen=True)
class Unlucky(Scaffold):
    """SCAFFOLD; in the first round a slot dies of its second client's end, and its first client raises from then on."""

    folder: str = ""

    def finish(self, update, broadcast, memory, ends):
        """As SCAFFOLD's, or not at all."""
        if broadcast.round == 0:
            first, died = Path(self.folder) / "first", Path(self.folder) / "died"
            with suppress(FileExistsError):
                first.symlink_to(f"{update.client} {os.getpid()}")  # is there at once, with its text
            client, process = os.readlink(first).split()
            if died.exists() and client == str(update.client):
                raise ArithmeticError("its rows add up to nothing")
            if not died.exists() and client != str(update.client) and process == str(os.getpid()):
                died.touch()
                os._exit(1)
        return super().finish(update, broadcast, memory, ends)


@pytest.mark.slow
def test_who_fails_after_its_first_slot_died_remembers_nothing_of_the_round(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("two runs; a slot killed between two clients is tried")
    changes = ("train.optimizer={kind='sgd', lr=0.3}", "clients.max_failed=0.5", "clients.retries=1")
    dying, failing = tmp_path / "dying", tmp_path / "failing"
    dying.mkdir()
    failing.mkdir()
    recipe = small_recipe(*QUIET, *changes)
    run = experiments.run(replace(recipe, strategy=Unlucky(folder=str(dying))), out=dying / "run")
    (failing / "died").touch()
    (failing / "first").symlink_to(os.readlink(dying / "first"))  # fails from the start
    other = experiments.run(replace(recipe, strategy=Unlucky(folder=str(failing))), out=failing / "run")
    assert [kind for _, kind, _, _ in faults(run)] == ["slot", "client", "client"]
    assert [kind for _, kind, _, _ in faults(other)] == ["client", "client"]
    assert bits(run) == bits(other)


@pytest.mark.slow
def test_who_drops_out_with_its_slot_remembers_nothing_of_the_round(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("one who fails after its first slot died is tried")
    secured = "privacy.secagg={mode='full', on_slot_death='dropout', dropout=0.5, bounds={c=1.0}}"
    changes = (
        *QUIET,
        secured,
        "strategy=scaffold",
        "rounds=1",
        "clients.slots=2",
        "train.optimizer={kind='sgd', lr=0.3}",
    )
    events = []
    recipe = replace(small_recipe(*changes), strategy=Unlucky(folder=str(tmp_path)))
    run = experiments.run(recipe, out=tmp_path / "run", on_event=events.append)
    (round_,) = (event for event in events if isinstance(event, RoundDone))
    assert 0 < len(round_.gone) < 8 and round_.aborted is None
    assert (
        len(list((run.folder / "client_state").glob("*/*/00001.safetensors"))) == round_.clients == 8 - len(round_.gone)
    )
