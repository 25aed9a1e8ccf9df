"""What the cells of `fedpost bench strategies` show: figures of each, a table, a plot, and all of it as Parquet."""

import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.records.metrics import read_log
from engine.system.atomic import write_file
from experiments.config.recipe import Recipe

BASELINE = "fedavg"
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # told apart by all (Okabe and Ito)
HEAD = (
    "| rule | seeds | held-out | against fedavg | unseen | worst tenth | personal | its worst tenth | kB up | kB down "
    "| round, s | server, ms |\n|---|" + "--:|" * 11
)


@dataclass(frozen=True)
class Cell:
    """A finished cell's figures: losses in nats per token at the end, bytes a client and round, medians of seconds.

    `worst_tenth` is the mean loss of the tenth of the clients that has the highest. `personal` judges each client by
    the model that it would use: its own once it has one, else the global one. NaN: there is no such figure.
    """

    partition: str
    rule: str
    seed: int
    rounds: int
    before: float
    heldout: float
    unseen: float
    worst_tenth: float
    personal: float
    personal_worst_tenth: float
    bytes_up: float
    bytes_down: float
    round_s: float
    server_s: float


def read_cell(folder: Path, rule: str, partition: str, recipe: Recipe) -> Cell:
    """The figures of a run folder."""
    rows = read_log(folder / "metrics").to_pylist()
    last = recipe.rounds

    def one(split: str, name: str, round_: int = last) -> float:
        found = [
            r["value"] for r in rows if (r["split"], r["name"], r["round"], r["client"]) == (split, name, round_, None)
        ]
        return float(found[0]) if found else math.nan

    def clients(name: str) -> dict[str, float]:
        judged = (r for r in rows if (r["split"], r["name"], r["round"]) == ("heldout", name, last))
        return {r["client"]: r["value"] for r in judged if r["client"] is not None}

    def engine(name: str) -> list[float]:
        return [r["value"] for r in rows if (r["split"], r["name"]) == ("engine", name)]

    losses, own, tokens = clients("loss"), clients("loss_personal"), clients("tokens")
    used = losses | own
    mean = sum(used[client] * tokens[client] for client in used) / sum(tokens[client] for client in used)
    took_part = sum(engine("clients"))
    return Cell(
        partition=partition,
        rule=rule,
        seed=recipe.seed,
        rounds=last,
        before=one("heldout", "loss", 0),
        heldout=one("heldout", "loss"),
        unseen=one("unseen", "loss"),
        worst_tenth=worst_tenth(list(losses.values())),
        personal=mean if own else math.nan,
        personal_worst_tenth=worst_tenth(list(used.values())) if own else math.nan,
        bytes_up=sum(engine("protocol_bytes_up")) / took_part,
        bytes_down=sum(engine("protocol_bytes_down")) / took_part,
        round_s=statistics.median(engine("round_s")),
        server_s=statistics.median(engine("apply_s") or [math.nan]),
    )


def worst_tenth(losses: Sequence[float]) -> float:
    """The mean of the highest tenth, of one at least."""
    worst = sorted(losses)[-max(1, len(losses) // 10) :]
    return statistics.fmean(worst)


def compare(cells: Sequence[Cell], out: Path) -> None:
    """Writes cells.parquet, table.md and plot.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(cell) for cell in cells]), sink)
    write_file(out / "cells.parquet", sink.getvalue().to_pybytes())
    write_file(out / "table.md", table(cells).encode())
    write_file(out / "plot.png", plot(cells))


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a table a partition, a row a rule, means over the seeds with half their range."""
    text = []
    for partition in dict.fromkeys(cell.partition for cell in cells):
        inside = [cell for cell in cells if cell.partition == partition]
        baseline = {cell.seed: cell.heldout for cell in inside if cell.rule == BASELINE}
        before = statistics.fmean(cell.before for cell in inside)
        text.append(f"Partition {partition}, {inside[0].rounds} rounds; held-out loss before training {before:.3f}.\n")
        text.append(HEAD)
        for rule, group in _by_rule(inside).items():
            against = [cell.heldout - baseline[cell.seed] for cell in group if cell.seed in baseline]
            columns = [_spread([cell.heldout for cell in group])]
            columns.append(f"{statistics.fmean(against):+.3f}" if against and rule != BASELINE else "")
            losses = ("unseen", "worst_tenth", "personal", "personal_worst_tenth")
            columns += [_spread([getattr(cell, name) for cell in group]) for name in losses]
            columns += [f"{_mean(group, lambda cell: cell.bytes_up) / 1e3:,.0f}"]
            columns += [f"{_mean(group, lambda cell: cell.bytes_down) / 1e3:,.0f}"]
            columns += [_plain(_mean(group, lambda cell: cell.round_s), ".1f")]
            columns += [_plain(1e3 * _mean(group, lambda cell: cell.server_s), ".0f")]
            text.append(f"| {rule} | {len(group)} | {' | '.join(columns)} |")
        text.append("")
    return "\n".join(text)


def plot(cells: Sequence[Cell]) -> bytes:
    """A row of panels a partition: losses, bytes and time of each rule, as a PNG file."""
    partitions = list(dict.fromkeys(cell.partition for cell in cells))
    most = max(len(_by_rule([cell for cell in cells if cell.partition == name])) for name in partitions)
    figure = Figure(figsize=(12, (1.5 + 0.26 * most) * len(partitions)), layout="constrained", dpi=110)
    rows = figure.subplots(len(partitions), 3, squeeze=False, sharey="row", width_ratios=(5, 3, 2))
    for name, (losses, moved, time) in zip(partitions, rows, strict=True):
        groups = _by_rule([cell for cell in cells if cell.partition == name])
        _losses(losses, groups)
        _dots(moved, groups, "up", lambda cell: cell.bytes_up / 1e3, "o", BLUE)
        _dots(moved, groups, "down", lambda cell: cell.bytes_down / 1e3, "s", VERMILION)
        moved.set_xscale("symlog", linthresh=10)
        most_kb = max(max(cell.bytes_up, cell.bytes_down) for group in groups.values() for cell in group) / 1e3
        moved.set(xlim=(0, 2 * most_kb), xlabel="kB a client and round")
        moved.legend(fontsize="small")
        _dots(time, groups, "round", lambda cell: cell.round_s, "o", BLUE)
        _dots(time, groups, "server", lambda cell: cell.server_s, "^", VERMILION)
        time.set(xlabel="seconds a round", xscale="log")
        time.legend(fontsize="small")
        losses.set_title(f"partition {name}", loc="left")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _losses(axes: Axes, groups: dict[str, list[Cell]]) -> None:
    _dots(axes, groups, "held-out", lambda cell: cell.heldout, "o", BLUE)
    _dots(axes, groups, "worst tenth", lambda cell: cell.worst_tenth, "^", VERMILION)
    _dots(axes, groups, "personal", lambda cell: cell.personal, "s", GREEN)
    if BASELINE in groups:
        for label in ("heldout", "worst_tenth"):
            level = statistics.fmean(getattr(cell, label) for cell in groups[BASELINE])
            axes.axvline(level, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel("loss at the end, nats per token (dashed: fedavg)")
    axes.legend(fontsize="small")


def _dots(
    axes: Axes, groups: dict[str, list[Cell]], label: str, value: Callable[[Cell], float], mark: str, colour: str
) -> None:
    at = [(value(cell), row) for row, group in enumerate(groups.values()) for cell in group]
    known = [point for point in at if math.isfinite(point[0])]
    axes.plot(
        *zip(*known, strict=True) if known else ([], []), mark, color=colour, label=label, markersize=5, alpha=0.8
    )
    axes.grid(axis="x", linewidth=0.4)


def _by_rule(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.rule, []).append(cell)
    return groups


def _mean(group: Sequence[Cell], value: Callable[[Cell], float]) -> float:
    return statistics.fmean(value(cell) for cell in group)


def _plain(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _spread(values: Sequence[float]) -> str:
    half = (max(values) - min(values)) / 2
    return _plain(statistics.fmean(values), ".3f") + (f" ± {half:.3f}" if half > 0 else "")
