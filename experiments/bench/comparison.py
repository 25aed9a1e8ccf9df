"""What `fedpost bench strategies` shows: each cell's figures as Parquet, and tables of means as Markdown and a page."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.records.metrics import read_log
from engine.system.atomic import write_file
from experiments.bench.results import Cell, Tables, render
from experiments.config.recipe import Recipe

BASELINE, AGAINST = "fedavg", "against fedavg"
# A column: the result's figure in it, in which unit, and the digits; losses stand with half of their range over seeds.
COLUMNS = {
    "held-out": ("heldout", 1.0, ".3f"),
    AGAINST: ("", 1.0, "+.3f"),
    "unseen": ("unseen", 1.0, ".3f"),
    "worst tenth": ("worst_tenth", 1.0, ".3f"),
    "personal": ("personal", 1.0, ".3f"),
    "its worst tenth": ("personal_worst_tenth", 1.0, ".3f"),
    "kB up": ("bytes_up", 1e3, ",.0f"),
    "kB down": ("bytes_down", 1e3, ",.0f"),
    "round, s": ("round_s", 1.0, ".1f"),
    "server, ms": ("server_s", 1e-3, ".0f"),
}


@dataclass(frozen=True)
class Result:
    """A rule's figures with a seed: losses in nats per token at the end, bytes a client and round, median seconds.

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


def read_result(folder: Path, rule: str, partition: str, recipe: Recipe) -> Result:
    """The figures of a run folder."""
    last, rows = recipe.rounds, read_log(folder / "metrics").to_pylist()
    values = {(row["split"], row["name"], row["round"], row["client"]): row["value"] for row in rows}

    def loss(split: str, round_: int = last) -> float:
        return float(values.get((split, "loss", round_, None), math.nan))

    def engine(name: str) -> list[float]:
        return [row["value"] for row in rows if (row["split"], row["name"]) == ("engine", name)] or [math.nan]

    def at_end(name: str) -> dict[str, float]:
        return {key[3]: value for key, value in values.items() if key[:3] == ("heldout", name, last) and key[3]}

    losses, personal, tokens = map(at_end, ("loss", "loss_personal", "tokens"))
    used = losses | personal
    mean = sum(used[client] * tokens[client] for client in used) / sum(tokens[client] for client in used)
    worst, personal_worst = (worst_tenth(list(each.values())) for each in (losses, used))
    mean, personal_worst = (mean, personal_worst) if personal else (math.nan, math.nan)
    ways = (sum(engine(f"protocol_bytes_{way}")) / sum(engine("clients")) for way in ("up", "down"))
    seconds = (statistics.median(engine(name)) for name in ("round_s", "apply_s"))
    ends = loss("heldout", 0), loss("heldout"), loss("unseen"), worst, mean, personal_worst
    return Result(partition, rule, recipe.seed, last, *ends, *ways, *seconds)


def worst_tenth(losses: Sequence[float]) -> float:
    """The mean of the highest tenth, of one at least."""
    return statistics.fmean(sorted(losses)[-max(1, len(losses) // 10) :])


def compare(results: Sequence[Result], out: Path) -> None:
    """Writes cells.parquet, table.md and report.html into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    sink, shown = pa.BufferOutputStream(), tables(results)
    pq.write_table(pa.Table.from_pylist([asdict(result) for result in results]), sink)
    write_file(out / "cells.parquet", sink.getvalue().to_pybytes())
    write_file(out / "table.md", markdown(shown).encode())
    write_file(out / "report.html", render(shown, []))


def tables(results: Sequence[Result]) -> Tables:
    """A table for each partition: each rule with its means over the seeds."""
    rows: Tables = {}
    for partition in dict.fromkeys(result.partition for result in results):
        there = [result for result in results if result.partition == partition]
        baseline = {result.seed: result.heldout for result in there if result.rule == BASELINE}
        before = statistics.fmean(result.before for result in there)
        caption = f"Partition {partition}, {there[0].rounds} rounds; held-out loss before training {before:.3f}."
        rows[caption] = [[Cell(head) for head in ("rule", "seeds", *COLUMNS)]]
        for rule in dict.fromkeys(result.rule for result in there):
            group = [result for result in there if result.rule == rule]
            rows[caption].append([Cell(rule), Cell(str(len(group)))])
            for head, (field, unit, digits) in COLUMNS.items():
                values = [getattr(result, field) / unit for result in group] if field else []
                if head == AGAINST and rule != BASELINE:
                    values = [each.heldout - baseline[each.seed] for each in group if each.seed in baseline]
                rows[caption][-1].append(_cell(head, values, digits))
    return rows


def _cell(head: str, values: Sequence[float], digits: str) -> Cell:
    if not values or math.isnan(mean := statistics.fmean(values)):
        return Cell("")
    half = (max(values) - min(values)) / 2 if digits == ".3f" else 0
    return Cell(f"{mean:{digits}}" + (f" ± {half:.3f}" if half > 0 else ""), mean, head)


def markdown(shown: Tables) -> str:
    """The tables as Markdown."""
    lines = []
    for caption, rows in shown.items():
        heads, *texts = (f"| {' | '.join(cell.text for cell in row)} |" for row in rows)
        lines += [f"{caption}\n", heads, "|---|" + "--:|" * (len(rows[0]) - 1), *texts, ""]
    return "\n".join(lines)
