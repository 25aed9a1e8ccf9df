"""What processes hold while a benchmark runs, and what Ray's object store has taken in."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import psutil
import ray

from engine.messages.errors import RunError
from experiments.config.recipe import Recipe, to_toml
from experiments.preflight.processes import memory

DAEMONS = ("raylet", "gcs_server", "log_monitor", "monitor.py", "dashboard", "Agent", "runtime_env", "ray::IDLE")
T = TypeVar("T")


@contextmanager
def sampled(read: Callable[[], T], every_s: float) -> Iterator[list[T]]:
    """Reads every `every_s` seconds in another thread while the block runs, and once before."""
    readings, ended = [read()], threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            readings.append(read())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield readings
    finally:
        ended.set()
        thread.join()


def workers_mb(titles: tuple[str, ...], *kinds: str) -> list[float]:
    """MB of each Ray actor with one of these titles below this process, of kinds of `memory` or "Pss", in sum."""
    readings = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, OSError):
            if any(f"ray::{title}" in "".join(process.cmdline()) for title in titles):
                # A page that n processes share counts as 1/n of a page.
                pss = process.memory_full_info().pss / 2**20 if "Pss" in kinds else 0.0
                held = memory(process.pid) | {"Pss": pss}
                readings.append(sum(held.get(kind, 0.0) for kind in kinds))
    return readings


def command_mb(work: Recipe, folder: Path) -> tuple[float, float]:
    """Runs a recipe in `folder` by `fedpost run`; returns the most RSS and PSS of its processes but Ray's daemons."""
    folder.mkdir()
    (recipe := folder / "recipe.toml").write_text(to_toml(work), encoding="utf-8")
    command = [sys.executable, "-m", "experiments", "run", str(recipe), "--out", str(folder / "run")]
    with (
        (folder / "output").open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as process,
        sampled(lambda: _tree_mb(process.pid), 0.25) as readings,
    ):
        process.wait()
    if process.returncode:
        raise RuntimeError(f"the command ended with {process.returncode}: {(folder / 'output').read_text()[-500:]}")
    rss, pss = map(max, zip(*readings, strict=True))
    return rss, pss


def _tree_mb(command: int) -> tuple[float, float]:
    rss = pss = 0.0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(command)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                if not any(name in " ".join(process.cmdline()[:4]) for name in DAEMONS):
                    used = process.memory_full_info()
                    rss, pss = rss + used.rss / 2**20, pss + used.pss / 2**20
    return rss, pss


def stored_bytes() -> float:
    """Bytes of objects that all nodes' stores have taken in (not those in Ray's messages); RunError without grpcio."""
    if find_spec("grpc") is None:
        raise RunError('this benchmark asks Ray by grpcio: pip install "fedpost[bench]"')
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return float(get_memory_info_reply(state).store_stats.cumulative_created_bytes)
