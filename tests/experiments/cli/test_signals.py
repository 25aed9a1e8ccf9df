"""A command that is asked to end leaves nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from experiments.config.recipe import to_toml
from experiments.runs.driving import stopped_by_interrupt

ROOT = Path(__file__).resolve().parents[3]


def test_a_partition_that_is_asked_to_end_leaves_no_scratch_folder(small_recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    line = {"prompt": "p" * 300, "completion": "c" * 300}
    rows.write_text(
        "".join(
            json.dumps({"client": i % 50, **line, "n": i}).replace("p" * 9, str(i), 1) + "\n" for i in range(300_000)
        )
    )
    stores, recipe = tmp_path / "stores", tmp_path / "recipe.toml"
    recipe.write_text(to_toml(small_recipe(f"data.source.path='{rows}'", f"data.cache='{stores}'")))
    command = [sys.executable, "-m", "experiments", "partition", str(recipe)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(stores.glob(".*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert list(stores.iterdir()) == []


def test_the_second_interrupt_stops_at_once():
    said = []
    with pytest.raises(KeyboardInterrupt), stopped_by_interrupt(said.append, lambda: True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert stop.is_set() and len(said) == 1
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    with pytest.raises(KeyboardInterrupt), stopped_by_interrupt(said.append, lambda: False) as stop:
        os.kill(os.getpid(), signal.SIGINT)  # nothing has begun that could be finished
        time.sleep(10)
    assert not stop.is_set() and len(said) == 1


@pytest.mark.slow
def test_two_interrupts_end_a_command_and_its_cluster_within_a_round(small_recipe, tmp_path, full):
    if not full:
        pytest.skip("the handler by itself is tried")
    recipe, out, log = tmp_path / "recipe.toml", tmp_path / "run", tmp_path / "log"
    recipe.write_text(to_toml(small_recipe("rounds=2", "train.steps=100000")))  # a round takes an hour
    command = [sys.executable, "-m", "experiments", "run", str(recipe), "--out", str(out)]
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=written)
    _until(lambda: "trained parameters" in log.read_text(), process)
    cluster = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _until(lambda: "finishing the round" in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert len(cluster) > 3 and not psutil.wait_procs(cluster, 30)[1]


def _until(seen, process):
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
