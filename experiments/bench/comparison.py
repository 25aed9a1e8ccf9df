"""What the cells of `fedpost bench strategies` show: figures of each, a table, a plot, and all of it as Parquet."""

import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.records.metrics import read_log
from engine.system.atomic import write_file
from experiments.config.recipe import Recipe

BASELINE = "fedavg"
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # distinct for everybody (Okabe and Ito)
HEAD = (
    "| rule | seeds | held-out | against fedavg | unseen | worst tenth | personal | its worst tenth | kB up | kB down "
    "| round, s | server, ms |\n|---|" + "--:|" * 11
)


@dataclass(frozen=True)
class Cell:
    """A finished cell's figures: losses in nats per token at the end, bytes a client and round, medians of seconds.

    `worst_tenth` is the mean loss of the tenth of the clients that has the highest. `personal` evaluates each client on
    the model that it would use: a personal one once it has it, else the global one. NaN: there is no such figure.
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
    last = recipe.rounds
    values: dict[tuple[str, str], dict[int, float]] = {}  # (split, name) -> round -> value of all clients together
    losses_of: dict[str, dict[str, float]] = {}  # name -> client -> value at the end
    for row in read_log(folder / "metrics").to_pylist():
        key = row["split"], row["name"]
        if row["client"] is None:
            values.setdefault(key, {})[row["round"]] = row["value"]
        elif row["split"] == "heldout" and row["round"] == last:
            losses_of.setdefault(row["name"], {})[row["client"]] = row["value"]

    def loss(split: str, round_: int = last) -> float:
        return float(values.get((split, "loss"), {}).get(round_, math.nan))

    def engine(name: str) -> list[float]:
        return list(values.get(("engine", name), {}).values())

    losses, personal, tokens = (losses_of.get(name, {}) for name in ("loss", "loss_personal", "tokens"))
    used = losses | personal
    mean = sum(used[client] * tokens[client] for client in used) / sum(tokens[client] for client in used)
    took_part = sum(engine("clients"))
    return Cell(
        partition=partition,
        rule=rule,
        seed=recipe.seed,
        rounds=last,
        before=loss("heldout", 0),
        heldout=loss("heldout"),
        unseen=loss("unseen"),
        worst_tenth=worst_tenth(list(losses.values())),
        personal=mean if personal else math.nan,
        personal_worst_tenth=worst_tenth(list(used.values())) if personal else math.nan,
        bytes_up=sum(engine("protocol_bytes_up")) / took_part,
        bytes_down=sum(engine("protocol_bytes_down")) / took_part,
        round_s=statistics.median(engine("round_s")),
        server_s=statistics.median(engine("apply_s") or [math.nan]),
    )


def worst_tenth(losses: Sequence[float]) -> float:
    """The mean of the highest tenth, of one at least."""
    return statistics.fmean(sorted(losses)[-max(1, len(losses) // 10) :])


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
    for partition, rules in _grouped(cells).items():
        baseline = {cell.seed: cell.heldout for cell in rules.get(BASELINE, [])}
        before = statistics.fmean(cell.before for group in rules.values() for cell in group)
        rounds = next(iter(rules.values()))[0].rounds
        text.append(f"Partition {partition}, {rounds} rounds; held-out loss before training {before:.3f}.\n")
        text.append(HEAD)
        for rule, group in rules.items():
            against = [cell.heldout - baseline[cell.seed] for cell in group if cell.seed in baseline]
            mean = {
                field.name: statistics.fmean(getattr(cell, field.name) for cell in group)
                for field in fields(Cell)
                if field.type in (float, "float")
            }
            columns = [_spread([cell.heldout for cell in group])]
            columns.append(f"{statistics.fmean(against):+.3f}" if against and rule != BASELINE else "")
            losses = ("unseen", "worst_tenth", "personal", "personal_worst_tenth")
            columns += [_spread([getattr(cell, name) for cell in group]) for name in losses]
            columns += [f"{mean[name] / 1e3:,.0f}" for name in ("bytes_up", "bytes_down")]
            columns += [_text(mean["round_s"], ".1f"), _text(1e3 * mean["server_s"], ".0f")]
            text.append(f"| {rule} | {len(group)} | {' | '.join(columns)} |")
        text.append("")
    return "\n".join(text)


def plot(cells: Sequence[Cell]) -> bytes:
    """A row of panels a partition: losses, bytes and time of each rule, as a PNG file."""
    partitions = _grouped(cells)
    figure = Figure(
        figsize=(12, (1.5 + 0.26 * max(map(len, partitions.values()))) * len(partitions)), layout="constrained", dpi=110
    )
    rows = figure.subplots(len(partitions), 3, squeeze=False, sharey="row", width_ratios=(5, 3, 2))
    for (name, rules), (losses, moved, time) in zip(partitions.items(), rows, strict=True):
        _dots(losses, rules, "held-out", "heldout", "o", BLUE)
        _dots(losses, rules, "worst tenth", "worst_tenth", "^", VERMILION)
        _dots(losses, rules, "personal", "personal", "s", GREEN)
        for field in ("heldout", "worst_tenth") if BASELINE in rules else ():
            level = statistics.fmean(getattr(cell, field) for cell in rules[BASELINE])
            losses.axvline(level, color=GREY, linewidth=0.8, linestyle="--")
        losses.set_yticks(range(len(rules)), list(rules))
        losses.invert_yaxis()
        losses.set_xlabel("loss at the end, nats per token (dashed: fedavg)")
        losses.set_title(f"partition {name}", loc="left")
        _dots(moved, rules, "up", "bytes_up", "o", BLUE, unit=1e3)
        _dots(moved, rules, "down", "bytes_down", "s", VERMILION, unit=1e3)
        moved.set_xscale("symlog", linthresh=10)
        most_kb = max(max(cell.bytes_up, cell.bytes_down) for group in rules.values() for cell in group) / 1e3
        moved.set(xlim=(0, 2 * most_kb), xlabel="kB a client and round")
        _dots(time, rules, "round", "round_s", "o", BLUE)
        _dots(time, rules, "server", "server_s", "^", VERMILION)
        time.set(xlabel="seconds a round", xscale="log")
        for axes in (losses, moved, time):
            axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _dots(
    axes: Axes, rules: dict[str, list[Cell]], label: str, field: str, mark: str, color: str, unit: float = 1.0
) -> None:
    """Draws a field of every cell, each rule in a row; a NaN is no dot."""
    points = [(getattr(cell, field) / unit, row) for row, group in enumerate(rules.values()) for cell in group]
    finite = [point for point in points if math.isfinite(point[0])]
    x, y = zip(*finite, strict=True) if finite else ((), ())
    axes.plot(x, y, mark, color=color, label=label, markersize=5, alpha=0.8)
    axes.grid(axis="x", linewidth=0.4)


def _grouped(cells: Sequence[Cell]) -> dict[str, dict[str, list[Cell]]]:
    """Cells by partition and rule, in the order in which they come."""
    groups: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        groups.setdefault(cell.partition, {}).setdefault(cell.rule, []).append(cell)
    return groups


def _text(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _spread(values: Sequence[float]) -> str:
    half = (max(values) - min(values)) / 2
    return _text(statistics.fmean(values), ".3f") + (f" ± {half:.3f}" if half > 0 else "")
