"""Results of benchmarks: printed, kept as Parquet, JSON and a page, with the machine that they were measured on."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from experiments.bench.harness import Figure
from experiments.bench.page import RESULTS, write_page
from experiments.report.terminal import say
from experiments.runs.api import PACKAGES
from experiments.runs.resuming import RUNS


def show_results(scenario: str, figures: dict[str, Figure], as_json: bool, charts: Sequence[Markup] = ()) -> None:
    """Prints the figures, keeps them, and prints where; ends with one JSON object if `as_json`."""
    width = max(map(len, figures))
    for name, (value, unit) in figures.items():
        say(f"{name:>{width}}  {'not measured' if value is None else f'{value:,.4g} {unit}'}")
    say(f"{'kept as':>{width}}  {write_results(scenario, figures, charts)}")
    if as_json:
        say(json.dumps({name: figure.value for name, figure in figures.items()}))


def write_results(scenario: str, figures: dict[str, Figure], charts: Sequence[Markup] = ()) -> Path:
    """Writes `results.parquet`, `summary.json` and `report.html` into `runs/bench-SCENARIO-TIME`; returns the first.

    In the first, each figure is a row with the machine beside it; the second is one object, for scripts that compare.
    """
    facts = {"scenario": scenario, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **machine()}
    folder = RUNS / f"bench-{scenario}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    rows = [{"figure": name, "value": figure.value, "unit": figure.unit, **facts} for name, figure in figures.items()]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(1, "value", table["value"].cast(pa.float64()))  # all may be missing, or integers
    pq.write_table(table, folder / RESULTS)
    summary = {**facts, "figures": {name: figure.value for name, figure in figures.items()}}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    write_page([folder], folder / "report.html", charts)
    return folder / RESULTS


def machine() -> dict[str, str | int]:
    """The processor, cores that this process may use, the system, Python, the packages' versions, and the commit."""
    packages = []
    for name in ("fedpost", "numpy", *PACKAGES, "datasets", "flwr-datasets"):
        with suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": ", ".join(packages),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this code, with a plus if files have changed since."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no repository, or no git
        return "unknown commit"


def _cpu() -> str:
    models = list[str]()
    with suppress(OSError):  # not Linux
        models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return next(iter(models), "") or platform.processor() or "unknown"
