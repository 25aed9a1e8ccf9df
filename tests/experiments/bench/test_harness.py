"""What all benchmarks share: timing, the memory of processes, and a folder that goes with its scenario."""

import os
import subprocess
import sys
import time
from itertools import count

import psutil
import pytest

from experiments.bench import harness
from experiments.bench.harness import Bench, Figure, measure, seconds_of
from experiments.bench.sampling import sampled, workers_mb


def test_a_scenario_returns_its_figures_and_its_folder_is_removed(monkeypatch):
    folders = []

    def planted(bench: Bench) -> None:
        folders.append(bench.folder)
        (bench.folder / "rows").write_text("x")
        bench.add("size", 1.0 if bench.small else 2.0, "x")
        bench.add("gone", None, "times")

    monkeypatch.setattr(harness, "scenario_of", {"planted": planted}.get)
    monkeypatch.setattr(harness, "WITHOUT_RAY", {"planted"})
    assert measure("planted", small=True) == {"size": Figure(1.0, "x"), "gone": Figure(None, "times")}
    assert not folders[0].exists()


def test_each_call_is_timed_by_the_given_clock():
    ticks, results = count(0, 5), iter("ab")
    assert seconds_of(lambda: next(results), 2, lambda: next(ticks)) == ([5, 5], "b")


def test_readings_are_taken_before_a_block_and_while_it_runs():
    numbers = count()
    with sampled(lambda: next(numbers), 0.001) as readings:
        assert readings[0] == 0
        while len(readings) < 3:
            time.sleep(0.001)
    taken = len(readings)
    time.sleep(0.02)
    assert len(readings) == taken and readings == list(range(taken))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kinds", [("Pss",), ("RssAnon", "RssFile"), ("RssAnon",)])
def test_the_memory_of_workers_is_read_by_their_titles(kinds):
    command, pipe = [sys.executable, "-c", "print(flush=True); input()", "ray::Rank.steps"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()  # its title is there
        assert workers_mb(("Gang",), *kinds) == []
        (held,) = workers_mb(("Gang", "Rank"), *kinds)
        assert 0 < held <= psutil.Process(process.pid).memory_info().rss / 2**20 + 1
        process.communicate(b"\n")


def test_a_scenario_is_imported_once_the_environment_of_its_ray_is_set():
    """Ray reads it as soon as it is imported, which scenarios do: without a token anybody here could join."""
    script = """
import importlib, os, sys

real = importlib.import_module

def look(name, package=None):
    if name != "experiments.bench.scenarios.bare_loop":
        return real(name, package)
    assert "ray" not in sys.modules
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    print(*map(os.environ.get, names), flush=True)
    os._exit(0)

from experiments.__main__ import main
importlib.import_module = look
sys.argv = ["fedpost", "bench", "tiny", "--small"]
main()
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    mode, token, elsewhere = process.stdout.split() or pytest.fail(process.stderr)
    assert (mode, len(token), elsewhere) == ("token", 64, "0")
