"""Benchmarks as one self-contained page: tables with a bar in each cell, and charts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from engine.messages.errors import RunError
from engine.system.atomic import write_file
from experiments.report.terminal import inert_lines

RESULTS = "results.parquet"
TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
MACHINE = "{time}, {cores} cores ({cpu}), {system}, Python {python}; {packages}"


class Cell(NamedTuple):
    """A cell's text; a positive value has a bar, as long as its share of the largest value of its kind."""

    text: str
    value: float = 0.0
    kind: str = ""


Tables = dict[str, list[list[Cell]]]  # by caption; the first row has the heads


def render(
    tables: dict[str, list[list[Cell]]], notes: Sequence[tuple[str, str]], charts: Sequence[Markup] = ()
) -> bytes:
    """The page: tables, labelled notes, and charts; all but the charts is escaped."""
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
    value = row and row["value"]
    if row is None or value is None:
        return Cell("" if row is None else "not measured")
    return Cell(f"{value:,.4g}", value, row["unit"].partition(",")[0])
