"""Results of benchmarks: printed, kept as Parquet, JSON and a page, with the machine that they were measured on."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.bench.harness import Figure
from experiments.bench.page import RESULTS, write_page
from experiments.report.terminal import say
from experiments.runs.api import PACKAGES
from experiments.runs.resuming import RUNS


def show_results(scenario: str, figures: dict[str, Figure], as_json: bool) -> Path:
    """Prints the figures, keeps them, and prints where; ends with one JSON object if `as_json`."""
    width = max(map(len, figures))
    for name, (value, unit) in figures.items():
        say(f"{name:>{width}}  {'not measured' if value is None else f'{value:,.4g} {unit}'}")
    kept = write_results(scenario, figures)
    say(f"{'kept as':>{width}}  {kept}")
    if as_json:
        say(json.dumps({name: figure.value for name, figure in figures.items()}))
    return kept


def write_results(scenario: str, figures: dict[str, Figure]) -> Path:
    """Writes `results.parquet`, `summary.json` and `report.html` into `runs/bench-SCENARIO-TIME`; returns the first.

    In the first, each figure is a row with the machine beside it; the second is one object, for scripts that compare.
    """
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
    """The commit of this code, with a plus where files have changed since."""
    root = Path(__file__).resolve().parents[2]
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no repository, or no git
        return "unknown commit"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or "unknown"
