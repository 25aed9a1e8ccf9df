"""What dies, hangs or lies while a run goes on, on real Ray and with real processes: the same bits in the end."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import torch

import experiments
from engine.messages.events import DriverLost, RoundDone, Started
from experiments.config.recipe import to_toml
from strategies.averaging.fedavg import FedAvg

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = "adapter_model.safetensors"
ROUNDS = 24  # events are told while a later round goes on already
QUIET = ("evaluate.every=0", f"rounds={ROUNDS}")


@dataclass(frozen=True)
class Raising(FedAvg):
    """FedAvg whose clients raise at the end of their work: `times` times in each round, or in some (round, client)."""

    only: tuple[tuple[int, int], ...] = ()
    times: int = 1
    folder: str = ""

    def finish(self, update, broadcast, memory, ends):
        """As FedAvg's, or not at all."""
        marks = [Path(self.folder) / f"{update.client}-{broadcast.round}-{n}" for n in range(self.times)]
        left = [mark for mark in marks if not mark.exists()]
        if left and (not self.only or (broadcast.round + 1, update.client) in self.only):
            left[0].touch()
            raise ArithmeticError("its rows add up to nothing")
        return super().finish(update, broadcast, memory, ends)


@pytest.fixture(autouse=True)
def own_classes_travel():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def undisturbed(ray_session, small_recipe, tmp_path_factory):
    """What every disturbed run must lead to."""
    return experiments.run(small_recipe(*QUIET), out=tmp_path_factory.mktemp("undisturbed") / "run")


def bits(run):
    return (run.model / ADAPTER).read_bytes()


def faults(run):
    """What the run has written down of what went wrong: kind, who, why."""
    paths = sorted((run.folder / "faults").glob("*.parquet"))
    return [(row["kind"], row["who"], row["why"]) for path in paths for row in pq.read_table(path).to_pylist()]


def processes_of(title):
    """All living processes of this session's Ray that have such a title."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ray::{title}" in " ".join(process.cmdline()[:1]):
                processes.append(process)
        except psutil.NoSuchProcess:
            continue
    return processes


def test_a_client_that_raises_is_tried_again(undisturbed, small_recipe, tmp_path):
    recipe = replace(small_recipe(*QUIET), strategy=Raising(folder=str(tmp_path)))
    run = experiments.run(recipe, out=tmp_path / "run")
    assert bits(run) == bits(undisturbed)
    rows = faults(run)
    assert len(rows) == 5 * ROUNDS and {(kind, why) for kind, _, why in rows} == {
        ("client", "ArithmeticError: its rows add up to nothing")
    }


def test_a_round_with_too_few_is_skipped_and_in_another_one_client_is_left_out(small_recipe, ray_session, tmp_path):
    recipe, events = small_recipe("evaluate.every=0", "rounds=2", "cohort.size=8"), []
    clients = replace(recipe.clients, retries=1, on_too_few="skip", max_failed=1.0, min_share=0.7)
    raising = Raising(only=((1, 1), (1, 2), (1, 3), (2, 3)), times=9, folder=str(tmp_path))
    run = experiments.run(
        replace(recipe, strategy=raising, clients=clients), out=tmp_path / "run", on_event=events.append
    )
    first, second = (event for event in events if isinstance(event, RoundDone))
    assert first.clients == 0 and "5 of 8 clients of round 1 gave an update" in first.aborted
    assert len(first.failed) == 3 and second.clients == 7 and len(second.failed) == 1 and second.aborted is None
    rows = [row for row in run.metrics.to_pylist() if (row["split"], row["name"], row["round"]) == ("train", "rows", 2)]
    assert len(rows) == 7 and not second.failed.keys() & {row["client"] for row in rows}
    (client,) = second.failed
    assert [who for _, who, _ in faults(run)].count(client) == 4  # tried twice in each round


def test_a_dead_driver_and_a_silent_slot_change_no_bit(undisturbed, small_recipe, tmp_path):
    others, events = set(processes_of("")), []

    def disturb(event):
        events.append(event)
        if (
            isinstance(event, RoundDone)
            and not any(isinstance(earlier, DriverLost) for earlier in events)
            and event.round == 2
        ):
            (driver,) = set(processes_of("Driver")) - others
            driver.kill()
        if isinstance(event, Started) and event.resumed is not None:
            (slot,) = set(processes_of("ClientActor")) - others
            slot.suspend()

    run = experiments.run(small_recipe(*QUIET, "clients.timeout_s=3.0"), out=tmp_path / "run", on_event=disturb)
    first, second = (event.resumed for event in events if isinstance(event, Started))
    assert first is None and 1 <= second < ROUNDS
    assert bits(run) == bits(undisturbed)
    kinds = [(kind, why) for kind, _, why in faults(run)]
    assert kinds[0][0] == "driver" and ("slot", "no answer for 3 s, which is clients.timeout_s") in kinds


def test_interrupted_once_it_finishes_the_round_and_a_damaged_checkpoint_is_passed_over(
    undisturbed, small_recipe, tmp_path
):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(to_toml(small_recipe("evaluate.every=0", "rounds=18")))
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "experiments", "run", str(recipe), "--out", str(out)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "00002").exists() and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = (tmp_path / "log").read_text()
    older, newer = sorted((out / "checkpoints").iterdir())
    assert "finishing the round" in said and "--resume continues from there" in said
    assert f"stopped after round {int(newer.name)} of 18" in said
    damaged = newer / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    events = []
    run = experiments.run(small_recipe(*QUIET), out=out, resume=True, on_event=events.append)  # more rounds
    started = next(event for event in events if isinstance(event, Started))
    assert started.resumed == int(older.name)
    assert any(f"{newer} cannot be read" in note for note in started.notes)
    assert bits(run) == bits(undisturbed)


@dataclass(frozen=True)
class TooLarge(FedAvg):
    """FedAvg on slots that have memory for so many clients at once."""

    most: int = 2

    def starts(self, broadcast, memory):
        """As FedAvg's; the next client that begins before one of so many has ended finds no memory left."""
        began.append(1)
        if len(began) > self.most:
            began.clear()
            torch.empty(2**60)  # which no system gives
        return super().starts(broadcast, memory)

    def finish(self, update, broadcast, memory, ends):
        """As FedAvg's."""
        began.clear()
        return super().finish(update, broadcast, memory, ends)


began = []  # of each slot's process


@pytest.mark.slow
@pytest.mark.parametrize(("most", "tries"), [(1, 2), (2, 1)])
def test_a_pack_that_is_too_large_gives_the_bits_of_its_parts(ray_session, small_recipe, tmp_path, full, most, tries):
    if not full:
        pytest.skip("two runs each; a pack whose slot dies is tried")
    changes = ("evaluate.every=0", "rounds=3", "cohort.size=4")
    parts = experiments.run(small_recipe(*changes, f"clients.lanes={most}"), out=tmp_path / "parts")
    recipe = replace(small_recipe(*changes, "clients.lanes=4"), strategy=TooLarge(most=most))
    run = experiments.run(recipe, out=tmp_path / "run")
    assert bits(run) == bits(parts)
    rows = faults(run)
    assert len(rows) == 3 * 4 * tries and all(why.startswith("in lanes with clients ") for _, _, why in rows)


@dataclass(frozen=True)
class OneTooLarge(FedAvg):
    """FedAvg, in which one client asks for more memory than there is, in whatever company."""

    def finish(self, update, broadcast, memory, ends):
        """As FedAvg's."""
        if update.client == 3:
            torch.empty(2**60)
        return super().finish(update, broadcast, memory, ends)


def test_a_client_whose_memory_is_never_there_is_tried_in_smaller_packs_and_alone_then_named(
    ray_session, small_recipe, tmp_path
):
    changes = ("evaluate.every=0", "rounds=1", "cohort.size=8", "clients.lanes=4", "clients.max_failed=0.2")
    run = experiments.run(replace(small_recipe(*changes), strategy=OneTooLarge()), out=tmp_path / "run")
    rows = faults(run)
    assert all("can't allocate memory" in why for _, _, why in rows)
    sizes = {why.count(", ") + 1 for _, _, why in rows if why.startswith("in lanes with clients ")}
    alone = {who for _, who, why in rows if not why.startswith("in lanes with clients ")}
    assert sizes >= {2, 4} and len(alone) == 1
    (clients,) = [row["value"] for row in run.metrics.to_pylist() if row["name"] == "clients"]
    assert clients == 7


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "median"])
def test_a_node_that_is_removed_leaves_the_others_to_do_its_work(ray_session, small_recipe, tmp_path, full, strategy):
    if not full:
        pytest.skip("a minute: a cluster of two nodes")
    recipe = tmp_path / "recipe.toml"
    changes = ("evaluate.every=0", "clients.slots=4", f"rounds={ROUNDS}", f"strategy={strategy}")
    recipe.write_text(to_toml(small_recipe(*changes)))
    undisturbed = experiments.run(recipe, out=tmp_path / "undisturbed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    ended = subprocess.run(
        [sys.executable, "-c", REMOVED, str(recipe), str(tmp_path / "run")],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "run" / "model" / ADAPTER).read_bytes() == bits(undisturbed)
    assert "no place for another" in ended.stdout


REMOVED = """
import sys
from pathlib import Path
import experiments
from engine.messages.events import RoundDone
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
node = cluster.add_node(num_cpus=2)

def remove(event):
    if isinstance(event, RoundDone):
        if event.round == 1:
            cluster.remove_node(node, allow_graceful=False)
        print(event.faults, flush=True)

try:
    experiments.run(Path(sys.argv[1]), out=Path(sys.argv[2]), address=cluster.address, on_event=remove)
finally:
    cluster.shutdown()
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of eight megabytes; only the system's administrator may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_sentence_and_loses_nothing(undisturbed, small_recipe, small_disk, full):
    if not full:
        pytest.skip("what a full disk does to a file is tried beside it")
    ballast, out = small_disk / "ballast", small_disk / "run"

    def fill(event):
        if isinstance(event, RoundDone) and not ballast.exists():
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(
        ValueError, match=r"the disk that holds .* is full; free some space and run again with --resume"
    ):
        experiments.run(small_recipe(*QUIET), out=out, on_event=fill)
    ballast.unlink()
    assert bits(experiments.run(small_recipe(*QUIET), out=out, resume=True)) == bits(undisturbed)
