"""What all benchmarks share: figures with their units, steps shown while they work, and results kept as Parquet."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.runs.api import PACKAGES
from experiments.runs.resuming import RUNS

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


def show_results(scenario: str, figures: dict[str, Figure], as_json: bool) -> Path:
    """Prints the figures, keeps them, and says where; ends with one JSON object if that is asked for."""
    width = max(map(len, figures))
    for name, (value, unit) in figures.items():
        print(f"{name:>{width}}  {'not measured' if value is None else f'{value:,.4g} {unit}'}")
    kept = write_results(scenario, figures)
    print(f"{'kept as':>{width}}  {kept}")
    if as_json:
        print(json.dumps({name: figure.value for name, figure in figures.items()}))
    return kept


def write_results(scenario: str, figures: dict[str, Figure]) -> Path:
    """Writes `results.parquet`, `summary.json` and `report.html` into `runs/bench-SCENARIO-TIME`; returns the first.

    In the first, each figure is a row with the machine beside it; the second is one object, for scripts that compare.
    """
    from experiments.bench.page import RESULTS, write_page

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
    pq.write_table(table, folder / RESULTS)
    summary = {**facts, "figures": {name: figure.value for name, figure in figures.items()}}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    write_page([folder], folder / "report.html")
    return folder / RESULTS


def machine() -> dict[str, str | int]:
    """The processor, cores that this process may use, the system, Python, the packages' versions, and the commit."""
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
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit that this code is of, with a plus where it has been changed since."""
    root = Path(__file__).resolve().parents[2]
    try:
        said = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no repository, or no git
        return "unknown commit"
    return said.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown"
