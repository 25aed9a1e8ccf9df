"""Benchmarks' results as one self-contained page: figures side by side, and a picture of them by unit."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from engine.system.atomic import write_file

RESULTS = "results.parquet"
TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
Results = dict[str, dict[str, Any]]  # figure -> its row


def is_results(folder: Path) -> bool:
    """Whether a folder holds a benchmark's results, and no run."""
    return (folder / RESULTS).is_file()


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Writes the page about one result, or about several side by side; ValueError where one cannot be read."""
    found = [_read(folder) for folder in folders]
    names = dict.fromkeys(name for results in found for name in results)
    heads = [f"{row['scenario']}, {row['commit']}" for row in map(_any, found)]
    lines = []
    for name in names:
        unit = next(results[name]["unit"] for results in found if name in results)
        lines.append([name, *(_shown(results.get(name)) for results in found), unit])
    places = [_any(results) | {"folder": folder.name} for folder, results in zip(folders, found, strict=True)]
    picture = base64.b64encode(draw(found, heads)).decode()
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = pages.get_template("bench.html").render(heads=heads, lines=lines, places=places, picture=picture)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page.encode("utf-8", "replace"))
    return out


def draw(found: Sequence[Results], labels: Sequence[str]) -> bytes:
    """Bars of all figures, one panel for each unit, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    units: dict[str, list[str]] = {}
    for results in found:
        for name, row in results.items():
            if row["value"] is not None:
                names = units.setdefault(row["unit"].partition(",")[0], [])
                names.extend([name] if name not in names else [])
    heights = [len(names) * len(found) * 0.22 + 0.9 for names in units.values()] or [1.0]
    figure, panels = pyplot.subplots(
        len(heights), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for (unit, names), panel in zip(units.items(), panels[:, 0], strict=False):
        for place, results in enumerate(found):
            at = [row + place * 0.8 / len(found) for row in range(len(names))]
            values = [results[name]["value"] if name in results else None for name in names]
            drawn = [(y, value) for y, value in zip(at, values, strict=True) if value is not None]
            bars = panel.barh([y for y, _ in drawn], [v for _, v in drawn], 0.75 / len(found), label=labels[place])
            panel.bar_label(bars, [f" {value:,.4g}" for _, value in drawn], fontsize=8)
        panel.set(yticks=range(len(names)), yticklabels=names, title=unit)
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    if len(found) > 1 and units:
        panels[0, 0].legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return picture.getvalue()


def _read(folder: Path) -> Results:
    try:
        rows = pq.read_table(folder / RESULTS).to_pylist()
        return {str(row["figure"]): {**row, "commit": row.get("commit") or "unknown commit"} for row in rows}
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(f"{folder / RESULTS} cannot be read as a benchmark's results: {error}") from error


def _any(results: Results) -> dict[str, Any]:
    """A row, since each says where and when it was measured."""
    if not results:
        raise ValueError("a benchmark's results hold no figures")
    return next(iter(results.values()))


def _shown(row: dict[str, Any] | None) -> str:
    return "" if row is None else "not measured" if row["value"] is None else f"{row['value']:,.4g}"
