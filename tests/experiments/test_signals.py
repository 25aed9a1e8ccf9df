"""A command that is asked to end leaves nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import to_toml
from experiments.driving import stopped_by_interrupt

ROOT = Path(__file__).resolve().parents[2]


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
