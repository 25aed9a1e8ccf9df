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
from engine.system.atomic import write_file
from experiments.report import charts
from experiments.report.charts import Series, change, duration, loss, number, size
from experiments.report.run_folder import MAX_LISTED, Run, read_run
from experiments.report.terminal import inert_lines

SPLITS = {"heldout": "held-out", "unseen": "unseen clients", "train": "train", "server": "the server's rows"}
OF_SOME_RUNS = {
    "loss_personal": ("personal", "1 3"),
    "loss_finetuned": ("fine-tuned", "9 3"),
    "loss_not_private": ("not private", "5 2 1 2"),
}
BASELINES = {"loss_local_only": ("local only", "7 4"), "loss_centralized": ("centralized", "2 3")}
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
    """What makes the losses of runs be of other rows, or of other tokens of them."""
    keys = [key for key in JUDGED_BY if len({run.recipe.get(key) for run in runs}) > 1]
    return ["data"] * (len({run.manifest.get("data.key") for run in runs}) > 1) + keys


def _unit(run: Run) -> str:
    kind = run.recipe.get("train.objective") or run.recipe.get("train.objective.kind") or "sft"
    return "loss (nats per token)" if kind == "sft" else f"loss ({kind} objective)"


def _summary(run: Run) -> list[dict[str, Any]]:
    """A row per split: the losses of the first and last evaluated round, their change, and the baselines."""
    out = []
    for split in ("heldout", "unseen", "server"):
        points = run.points(split, "loss")
        if split == "server" and not points:
            continue  # most federations have no such rows
        row: dict[str, Any] = {"split": SPLITS[split], "first": "no data", "last": "no data", "change": "no data"}
        if points:
            (start, before), (end, after) = points[0], points[-1]
            row |= {"first": loss(before), "from": int(start)}
            if len(points) > 1:
                row |= {"last": loss(after), "to": int(end), "change": change(before, after), "better": after < before}
        for name in OF_SOME_RUNS | BASELINES:
            row[name] = loss(next((v for _, v in reversed(run.points(split, name))), None))
        out.append(row)
    return out


def _facts(run: Run) -> list[tuple[str, str]]:
    """Short facts with their values: what was run, and what it cost."""
    facts = [(label, run.recipe.get(key, "")) for label, key in RECIPE_FACTS.items()]
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
    old, new = (f"loss at round {round_}" for round_, _ in run.losses)
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
    colors = {split: i + 1 for i, split in enumerate(SPLITS)}
    curves = [Series(label, run.points(split, "loss"), colors[split]) for split, label in SPLITS.items()]
    for name, (label, dash) in (OF_SOME_RUNS | BASELINES).items():
        for split in ("heldout", "unseen", "server"):
            points = run.points(split, name)[-1:]
            curves.append(Series(f"{SPLITS[split]}, {label}", points, colors[split], dash, level=True))

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
        "loss": charts.lines("Loss", curves, "round", _unit(run)),
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


def render(runs: Sequence[Run]) -> str:
    """The page as text: the same runs give the same bytes."""
    sections = {"facts": _facts, "summary": _summary, "charts": _charts, "clients": _clients}
    sections |= {"ledger": _ledger, "failures": _failures}
    view = [
        {"id": f"run-{i + 1}", "color": i % charts.COLORS + 1, "run": run} | {k: s(run) for k, s in sections.items()}
        for i, run in enumerate(runs)
    ]
    overlay = []
    if len(runs) > 1:
        unit = _unit(runs[0]) if len({_unit(run) for run in runs}) == 1 else "loss"
        for split, title in (("heldout", "Held-out loss"), ("unseen", "Loss of unseen clients")):
            curves = [  # from the ninth run on, the colors repeat with dashes
                Series(run.name, run.points(split, "loss"), i % charts.COLORS + 1, "6 3" * (i >= charts.COLORS))
                for i, run in enumerate(runs)
            ]
            overlay.append(charts.lines(title, curves, "round", unit))
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    shown = {name: label for name, label in OF_SOME_RUNS.items() if any(run.points("heldout", name) for run in runs)}
    facts = {"runs": view, "overlay": overlay, "baselines": shown | BASELINES, "unlike": _unlike(runs)}
    page = env.get_template("report.html").render(facts)
    return inert_lines(page)  # JSON may hold lone surrogates, and a name may turn the direction of writing
