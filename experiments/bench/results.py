"""What all benchmarks share: figures with their units, steps shown while they work, and results kept as Parquet."""

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.api import PACKAGES
from experiments.resuming import RUNS

STATUS = Path("/proc/self/status")
EVERY_S = 2.0  # seconds between two lines about what goes on


class Figure(NamedTuple):
    """One result; its value is None where it could not be had on this machine."""

    value: float | None
    unit: str


class Steps:
    """Says on stderr what a benchmark does, and since when."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.said = self.began

    def say(self, step: str) -> None:
        """A line for a step."""
        self.said = time.monotonic()
        print(f"{self.said - self.began:6.1f} s  {step}", file=sys.stderr, flush=True)

    def say_now_and_then(self, step: str) -> None:
        """A line for one of many small steps, unless the last line is not old yet."""
        if time.monotonic() - self.said >= EVERY_S:
            self.say(step)


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives in a process of its own, whose memory and caches are nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory() -> dict[str, float]:
    """Megabytes of this process by their names in /proc: all that is resident, its own, the most there was."""
    if not STATUS.exists():
        return {}
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:", "VmHWM:")}


def write_results(scenario: str, figures: dict[str, Figure]) -> Path:
    """Writes the figures as `runs/bench-SCENARIO-TIME/results.parquet`, a row each with the machine beside it."""
    facts = {"scenario": scenario, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **machine()}
    values, units = zip(*figures.values(), strict=True)
    columns = {
        "figure": pa.array(figures, pa.string()),
        "value": pa.array(values, pa.float64()),
        "unit": pa.array(units, pa.string()),
    }
    folder = RUNS / f"bench-{scenario}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    table = pa.table(columns | {name: pa.array([fact] * len(figures)) for name, fact in facts.items()})
    pq.write_table(table, folder / "results.parquet")
    return folder / "results.parquet"


def machine() -> dict[str, str | int]:
    """The processor, how many cores this process may use, the system, Python, and the packages' versions."""
    packages = []
    for name in ("fedpost", "numpy", *PACKAGES, "datasets", "flwr-datasets"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": ", ".join(packages),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown"
