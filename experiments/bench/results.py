"""Results of benchmarks: printed, and kept as Parquet, JSON and a page, with the machine that they were measured on."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from engine.messages.errors import RunError
from engine.system.atomic import write_file
from experiments.bench.harness import Figure
from experiments.report.terminal import inert_lines, say
from experiments.runs.api import PACKAGES
from experiments.runs.resuming import RUNS, new_folder

RESULTS = "results.parquet"
TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
MACHINE = "{time}, {cores} cores ({cpu}), {system}, Python {python}; {packages}"


class Cell(NamedTuple):
    """A cell's text; a positive value has a bar, as long as its share of the largest value of its kind."""

    text: str
    value: float = 0.0
    kind: str = ""


Tables = dict[str, list[list[Cell]]]  # by caption; the first row has the heads


def render(tables: Tables, notes: Sequence[tuple[str, str]], charts: Sequence[Markup] = ()) -> bytes:
    """The page: tables, labeled notes, and charts; all but the charts is escaped."""
    largest = defaultdict[str, float](float)
    for cell in chain(*chain(*tables.values())):
        if cell.value < math.inf:
            largest[cell.kind] = max(largest[cell.kind], cell.value)

    def bar(cell: Cell) -> int:
        return round(100 * cell.value / largest[cell.kind]) if 0 < cell.value < math.inf else 0

    loader = jinja2.FileSystemLoader(TEMPLATES)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template("bench.html").render(tables=tables, notes=notes, charts=charts, bar=bar)
    return inert_lines(page).encode()


def is_results(folder: Path) -> bool:
    """Whether a folder holds a benchmark's results, and no run."""
    return (folder / RESULTS).is_file()


def write_page(folders: Sequence[Path], out: Path, charts: Sequence[Markup] = ()) -> Path:
    """Writes the page about one result, or about several side by side; RunError if one cannot be read."""
    results = [_read(folder) for folder in folders]
    facts = [next(iter(each.values())) for each in results]  # every row says where and when it was measured
    units = {name: row["unit"] for each in reversed(results) for name, row in each.items()}
    rows = [[Cell("figure"), *(Cell(f"{row['scenario']}, {row['commit']}") for row in facts), Cell("unit")]]
    for name in dict.fromkeys(chain(*results)):
        rows.append([Cell(name), *(_cell(each.get(name)) for each in results), Cell(units[name])])
    notes = [(folder.name, MACHINE.format(**row)) for folder, row in zip(folders, facts, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, render({"": rows}, notes, charts))
    return out


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The row of each figure."""
    try:
        rows = pq.read_table(folder / RESULTS).to_pylist()
        results = {str(row["figure"]): {**row, "commit": row.get("commit") or "unknown commit"} for row in rows}
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RunError(f"{folder / RESULTS} cannot be read as a benchmark's results: {error}") from error
    if not results:
        raise RunError(f"{folder / RESULTS} holds no figures: run the benchmark again")
    return results


def _cell(row: dict[str, Any] | None) -> Cell:
    """A figure; what is compared by bars is all of one unit, up to its first comma."""
    if row is None or row["value"] is None:
        return Cell("" if row is None else "not measured")
    return Cell(f"{row['value']:,.4g}", row["value"], row["unit"].partition(",")[0])


def show_results(scenario: str, figures: dict[str, Figure], as_json: bool, charts: Sequence[Markup] = ()) -> None:
    """Prints the figures, keeps them, and prints where; ends with one JSON object if `as_json`."""
    width = max(map(len, figures))
    for name, (value, unit) in figures.items():
        say(f"{name:>{width}}  {'not measured' if value is None else f'{value:,.4g} {unit}'}")
    say(f"{'kept as':>{width}}  {write_results(scenario, figures, charts)}")
    if as_json:
        say(json.dumps({name: figure.value for name, figure in figures.items()}))


def write_results(scenario: str, figures: dict[str, Figure], charts: Sequence[Markup] = ()) -> Path:
    """Writes `results.parquet`, `summary.json` and `report.html` into `runs/bench-SCENARIO-TIME`; returns the first."""
    facts = {"scenario": scenario, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **machine()}
    folder = new_folder(RUNS, f"bench-{scenario}")
    rows = ({"figure": name, "value": value, "unit": unit, **facts} for name, (value, unit) in figures.items())
    table = pa.Table.from_pylist(list(rows))
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
    with suppress(OSError):  # not Linux
        if model := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            return model[1]
    return platform.processor() or "unknown"
