"""One self-contained HTML page about runs: what was learned, which clients lost, the cost, and who saw what.

A run folder may be foreign. Nothing in it is run or unpickled (TOML, JSON and Parquet only), all of it is escaped
(jinja2 autoescape, `Markup.format` in the charts), and the policy of the page forbids scripts and the network.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from engine.messages.errors import RunError
from engine.records.metrics import JUDGED, with_unit
from engine.system.atomic import write_file
from experiments.report import charts
from experiments.report.charts import Series, change, duration, loss, number, size
from experiments.report.measures import (
    BASELINES,
    OF_SOME_RUNS,
    common_title,
    figure_charts,
    loss_chart,
    objective_options,
    shown_names,
    summary,
    unit_of,
)
from experiments.report.run_folder import MAX_LISTED, Run, read_run
from experiments.report.terminal import inert_lines

PARTIES = ("client", "other clients", "server", "base-model owner")  # listed even if they saw nothing
RECIPE_FACTS = {
    "base": "model.base",
    "strategy": "strategy.kind",
    "clients a round": "cohort.size",
    "secure aggregation": "privacy.secagg.mode",
    "differential privacy": "privacy.dp.kind",
}
COSTS: tuple[tuple[str, str, Callable[[list[float]], float], Callable[[float], str]], ...] = (
    ("training", "round_s", sum, duration),
    ("evaluation", "evaluate_s", sum, duration),
    ("median round", "round_s", statistics.median, duration),
    ("tokens a second", "tokens_per_s", statistics.median, "{:,.0f}".format),
    ("protocol up", "protocol_bytes_up", sum, size),
    ("protocol down", "protocol_bytes_down", sum, size),
)
# What decides, besides the data, which tokens a loss is of.
JUDGED_BY = ("seed", "model.base", "train.max_length", "evaluate.rows", "evaluate.server_rows")


def write_report(run_folders: Sequence[Path], out: Path) -> Path:
    """Writes the page about one run, or about several side by side, to `out`; RunError if one cannot be read."""
    if not run_folders:
        raise RunError("a report needs at least one run folder")
    if out.is_dir():
        raise RunError(f"{out} is a folder: name the HTML file to write")
    runs = [read_run(folder) for folder in run_folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, run_folders, strict=True):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({folder.resolve().name})"
    page = render(runs).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    return out


def _unlike(runs: Sequence[Run]) -> list[str]:
    """What makes the losses of runs be of other rows, of other tokens of them, or other losses."""
    keys = [key for key in JUDGED_BY if len({run.recipe.get(key) for run in runs}) > 1]
    options = [objective_options(run) for run in runs]
    names = dict.fromkeys(name for each in options for name in each)  # of later versions, earlier ones have not all
    keys += [f"train.objective.{name}" for name in names if len({each[name] for each in options if name in each}) > 1]
    return ["data"] * (len({run.manifest.get("data.key") for run in runs}) > 1) + keys


def _facts(run: Run) -> list[tuple[str, str]]:
    """Short facts with their values: what was run, and what it cost."""
    facts = [(label, run.recipe.get(key, "")) for label, key in RECIPE_FACTS.items()]
    facts.insert(2, ("objective", objective_options(run)["kind"]))
    rounds = [r for of in run.curves.values() for r in of]
    of = f" of {run.recipe['rounds']}" if "rounds" in run.recipe else ""
    facts.append(("last round", f"{max(rounds) if rounds else 'none'}{of}"))
    for label, name, combine, write in COSTS:
        if values := [value for _, value in run.points("engine", name) if math.isfinite(value)]:
            facts.append((label, write(combine(values))))
    return [(label, value) for label, value in facts if value]


def _hidden(run: Run) -> str:
    masked = run.recipe.get("privacy.secagg.mode") in ("ideal", "full")
    return "Secure aggregation shows sums, not single clients." if masked else ""


def _clients(run: Run) -> dict[str, Any]:
    """The paired plot of held-out losses, and the clients whose loss rose most."""
    title = "Held-out loss of each client"
    if len(run.losses) < 2 or not len(pairs := _pairs(*(table for _, table in run.losses))):
        return {"chart": charts.empty(title, _hidden(run)), "worst": [], "count": 0, "known": False}
    rise = pc.subtract(pairs["after"], pairs["before"]).to_numpy()
    lost = int((rise > 0).sum())
    note = f"{lost:,} of {len(pairs):,} clients got worse; the median change is {loss(float(np.median(rise)))}."
    worst = pairs.slice(max(0, len(pairs) - min(5, lost))).to_pylist()[::-1]
    listed = [(p["client"], loss(p["before"]), loss(p["after"]), change(p["before"], p["after"])) for p in worst]
    old, new = (with_unit(f"loss at round {round_}", unit_of(run, "loss")) for round_, _ in run.losses)
    return {"chart": charts.pairs(title, pairs, old, new, note), "worst": listed, "count": lost, "known": True}


def _pairs(before: pa.Table, after: pa.Table) -> pa.Table:
    """Each client's losses before and after, sorted by their change."""
    names = ["client", "before", "after"]
    pairs = before.rename_columns(names[:2]).join(after.rename_columns(names[::2]), "client", join_type="inner")
    for name in names[1:]:
        pairs = pairs.filter(pc.less_equal(pc.abs(pairs[name]), charts.LARGEST))  # NaN is not
    pairs = pairs.append_column("rise", pc.subtract(pairs["after"], pairs["before"]))
    return pairs.sort_by([("rise", "ascending"), ("client", "descending")]).select(names)


def _charts(run: Run) -> dict[str, Markup]:
    def engine(label: str, name: str, color: int, dash: str = "") -> Series:
        return Series(label, run.points("engine", name), color, dash)

    rows = run.rows.filter(pc.field("value") > 0)["value"].to_numpy()
    note = _hidden(run)
    if len(rows):
        note = f"{len(rows):,} clients trained, with a median of {number(float(np.median(rows)))} rows."
    time = [engine("train", "round_s", 1), engine("evaluate", "evaluate_s", 2)]
    # Up and down are often equal: with dashes both lines are visible.
    moved = [engine("protocol up", "protocol_bytes_up", 1), engine("protocol down", "protocol_bytes_down", 2, "8 8")]
    moved.append(engine("object store", "store_bytes", 3))
    kinds = "Protocol: what a real federation would send. Object store: what this simulation moved."
    speed = [engine("tokens a second", "tokens_per_s", 1)]
    return {
        "loss": loss_chart(run),
        "rows": charts.histogram("Rows of each client", rows, "rows", "clients", note),
        "time": charts.stacked("Time of a round", time, "round", "seconds"),
        "bytes": charts.lines("Bytes moved in a round", moved, "round", "bytes", size, zero=True, note=kinds),
        "speed": charts.lines("Throughput", speed, "round", "tokens per second", zero=True),
    }


def _ledger(run: Run) -> dict[str, Any]:
    seen, kinds = {p for p, _ in run.ledger}, sorted({k for _, k in run.ledger})
    parties = [*PARTIES, *sorted(seen.difference(PARTIES))]
    most = max((total for _, total in run.ledger.values()), default=0)
    # On a logarithmic scale, in percent: a prompt should be visible next to a gigabyte of updates.
    tints = {key: 34 * math.log1p(max(total, 0)) / math.log1p(max(most, 1)) for key, (_, total) in run.ledger.items()}
    cells = {
        key: {"count": f"{count:,}", "bytes": size(total), "tint": round(6 + tints[key])}
        for key, (count, total) in run.ledger.items()
    }
    left = max(0, len(parties) - MAX_LISTED), max(0, len(kinds) - MAX_LISTED)
    return {"parties": parties[:MAX_LISTED], "kinds": kinds[:MAX_LISTED], "cells": cells, "left": left}


def _failures(run: Run) -> dict[str, Any]:
    failed, clients = run.curves.get(("engine", "failed"), {}), run.curves.get(("engine", "clients"), {})
    bad = [(r, failed[r]) for r in sorted(failed) if math.isfinite(failed[r]) and failed[r] > 0]
    table = [(r, number(n), number(clients[r]) if r in clients else "no data") for r, n in bad[:MAX_LISTED]]
    total = number(sum(n for _, n in bad))
    return {"known": bool(failed), "total": total, "rounds": len(bad), "of": len(failed), "table": table}


def _compared(runs: Sequence[Run], split: str, name: str, title: str, y_label: str) -> Markup:
    """The loss or a figure of each run over rounds; from the ninth run on, the colors repeat with dashes."""
    metric = "loss" if name == "loss" else f"loss.{name}"
    curves = [
        Series(run.name, run.points(split, metric), i % charts.COLORS + 1, "6 3" * (i >= charts.COLORS))
        for i, run in enumerate(runs)
    ]
    return charts.lines(title, curves, "round", y_label)


def render(runs: Sequence[Run]) -> str:
    """The page as text: the same runs give the same bytes."""
    sections: dict[str, Callable[[Run], Any]] = {"facts": _facts, "charts": _charts, "figures": figure_charts}
    sections |= {"clients": _clients, "ledger": _ledger, "failures": _failures}
    view = [
        {"id": f"run-{i + 1}", "color": i % charts.COLORS + 1, "run": run} | {k: s(run) for k, s in sections.items()}
        for i, run in enumerate(runs)
    ]
    # Most federations have no rows of the server.
    splits = [split for split in JUDGED if split != "server" or any(run.points(split, "loss") for run in runs)]
    tables, overlay = [], []
    for name in shown_names(runs):
        title = common_title(runs, name)
        rows = [(each, summary(run, name, splits)) for each, run in zip(view, runs, strict=True)]
        tables.append({"title": title[0].upper() + title[1:], "runs": rows})
        if len(runs) > 1:
            overlay += [
                _compared(runs, "heldout", name, f"Held-out {name}", title),
                _compared(runs, "unseen", name, f"{name[0].upper()}{name[1:]} of unseen clients", title),
            ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    shown = {name: label for name, label in OF_SOME_RUNS.items() if any(run.points("heldout", name) for run in runs)}
    facts = {"runs": view, "tables": tables, "overlay": overlay}
    facts |= {"baselines": shown | BASELINES, "unlike": _unlike(runs)}
    page = env.get_template("report.html").render(facts)
    return inert_lines(page)  # JSON may hold lone surrogates, and a name may turn the direction of writing
