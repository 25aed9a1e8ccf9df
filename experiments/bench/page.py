"""Benchmarks' results as one self-contained page: figures side by side, and a picture of them by unit."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib import rc_context
from matplotlib.figure import Figure

from engine.messages.errors import RunError
from engine.system.atomic import write_file
from experiments.report.terminal import inert, inert_lines

RESULTS = "results.parquet"
TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
Results = dict[str, dict[str, Any]]  # figure -> its row


def is_results(folder: Path) -> bool:
    """Whether a folder holds a benchmark's results, and no run."""
    return (folder / RESULTS).is_file()


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Writes the page about one result, or about several side by side; RunError where one cannot be read."""
    results = [_read(folder) for folder in folders]
    facts = [next(iter(each.values())) for each in results]  # every row says where and when it was measured
    heads = [f"{row['scenario']}, {row['commit']}" for row in facts]
    lines = []
    for name in dict.fromkeys(name for each in results for name in each):
        unit = next(each[name]["unit"] for each in results if name in each)
        lines.append([name, *(_text(each.get(name)) for each in results), unit])
    places = [row | {"folder": folder.name} for folder, row in zip(folders, facts, strict=True)]
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    picture = base64.b64encode(draw(results, heads)).decode()
    page = pages.get_template("bench.html").render(heads=heads, lines=lines, places=places, picture=picture)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, inert_lines(page).encode())
    return out


@rc_context({"text.parse_math": False})
def draw(results: Sequence[Results], labels: Sequence[str]) -> bytes:
    """Bars of all figures, one panel for each unit, as a PNG; nothing in a name is markup."""
    units: dict[str, dict[str, None]] = {}  # names in the order in which they come
    for each in results:
        for name, row in each.items():
            if row["value"] is not None:
                units.setdefault(row["unit"].partition(",")[0], {})[name] = None
    heights = [len(names) * len(results) * 0.22 + 0.9 for names in units.values()] or [1.0]
    picture = Figure(figsize=(9, sum(heights)), layout="constrained", dpi=110)
    panels = picture.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (unit, names), panel in zip(units.items(), panels, strict=False):
        for place, each in enumerate(results):
            bars = {
                row + place * 0.8 / len(results): each[name]["value"]
                for row, name in enumerate(names)
                if name in each and each[name]["value"] is not None
            }
            drawn = panel.barh(list(bars), list(bars.values()), 0.75 / len(results), label=inert(labels[place]))
            panel.bar_label(drawn, [f" {value:,.4g}" for value in bars.values()], fontsize=8)
        panel.set(yticks=range(len(names)), yticklabels=list(map(inert, names)), title=inert(unit))
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    if len(results) > 1 and units:
        panels[0].legend(frameon=False)
    content = io.BytesIO()
    picture.savefig(content, format="png")
    return content.getvalue()


def _read(folder: Path) -> Results:
    try:
        rows = pq.read_table(folder / RESULTS).to_pylist()
        results = {str(row["figure"]): {**row, "commit": row.get("commit") or "unknown commit"} for row in rows}
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RunError(f"{folder / RESULTS} cannot be read as a benchmark's results: {error}") from error
    if not results:
        raise RunError(f"{folder / RESULTS} holds no figures: run the benchmark again")
    return results


def _text(row: dict[str, Any] | None) -> str:
    return "" if row is None else "not measured" if row["value"] is None else f"{row['value']:,.4g}"
