"""`fedpost bench strategies`: the demo's model under every rule, on two partitions.

A cell is a rule, a partition and a seed, with its own run folder. Finished cells are kept, killed ones resume from
their checkpoints, and table, page and Parquet are written again after each cell. Unless a rule's reason says otherwise,
all have the demo's AdamW with its learning rate of 0.003, and clients with equal weights; nothing else is tuned. Rules
whose theory assumes SGD have SGD: compare them with FedAvg on SGD.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

import experiments
from engine.messages.errors import RunError
from engine.records.metrics import read_log
from engine.system.atomic import write_file
from experiments.bench.harness import DEMO, SMALL_DEMO, Bench
from experiments.bench.results import Cell, Tables, render
from experiments.config.recipe import Recipe, parse_recipe, to_toml
from experiments.runs.resuming import RUNS, finished_rounds, new_folder

PARTITIONS = {
    "natural": (),
    # As many clients as the natural one has, over topics that k-means finds; the demo leaves out those with few rows.
    "topics": ('data.partition={kind="topic", clients=140, topics=10, alpha=0.1}',),
}
SEEDS = (7, 8, 9)
# Short prompts and rows, evaluated at round 0 and at the end only: 15 rounds of all cells in two hours.
CHANGES = (
    *("rounds=15", 'data.source={kind="python_docs", prompt_chars=200}', "train.steps=4", "train.max_length=128"),
    *("evaluate.every=0", "evaluate.rows=4", "checkpoint.every=5"),
)
SMALL_RULES = ("fedavg", "ditto")
SMALL_CHANGES = ("rounds=2", "cohort.size=2", *SMALL_DEMO)
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
SGD = 'train.optimizer={kind="sgd", lr=0.5}'  # in five rounds 0.3 is slower, 1 wavers, 3 diverges
DEFAULTS = "its defaults"
ADAM = "lr is about what a coordinate moves in a round; four local steps at 0.003 move one by up to 0.012"
NO_LIARS = "its defaults, and nobody lies"
PERSONAL = "what counts is its personal loss"


class Rule(NamedTuple):
    """A rule of the comparison: its name in it, its changes to the recipe, and why those; `main`: with all seeds."""

    name: str
    changes: tuple[str, ...]
    why: str = DEFAULTS
    main: bool = False


def _plain(kind: str, *changes: str, why: str = DEFAULTS, main: bool = False) -> Rule:
    """A rule that has the name of its kind of strategy, with the demo's other keys."""
    return Rule(kind, (f"strategy.kind={kind}", *changes), why, main)


RULES = (
    Rule("fedavg", (), "FedIT, the baseline, with the demo's optimizer", main=True),
    *(_plain(kind, main=True) for kind in ("ffa", "rolora", "fedex", "flexlora", "fedsvd")),
    _plain("fedadam", "strategy.lr=5e-3", why=ADAM, main=True),
    _plain("scaffold", SGD, why="c_k is a mean gradient for plain SGD alone", main=True),
    Rule("fedavg_sgd", (SGD,), "what SCAFFOLD, FedNova, q-FedAvg and Fed-SB must be compared with"),
    _plain("fednova", SGD, why="tau_k is known for SGD alone"),
    _plain("qfedavg", SGD, why="1 / lr stands for the loss's curvature, which holds for SGD alone"),
    _plain("fedsb", SGD, why="adaptive optimizers leave the span of its basis"),
    _plain("fedprox"),
    _plain("fedavgm", "strategy.lr=0.3", why="momentum 0.9 adds up to ten changes, of which 0.3 leaves three"),
    _plain("fedadagrad", "strategy.lr=5e-3", why="as FedAdam"),
    _plain("fedyogi", "strategy.lr=5e-3", why="as FedAdam"),
    _plain("diloco", 'train.state="keep"', why="its clients keep their optimizer's state"),
    *map(_plain, ("feddyn", "centered_clipping", "flora")),
    Rule("hetlora", ("strategy=hetlora",), "its weights, by norm; one rank for all"),
    *(_plain(kind, why=NO_LIARS) for kind in ("median", "trimmed_mean", "krum", "multi_krum", "bulyan", "rfa")),
    Rule("local", ("strategy=local",), PERSONAL),
    _plain("fedsa", why=PERSONAL),
    _plain("feddpa", why=f"{PERSONAL}; two adapters of half the rank"),
    _plain("ditto", why=PERSONAL),
)


class Trial(NamedTuple):
    """A cell before it has run."""

    rule: Rule
    partition: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """The cell's folder within the benchmark's."""
        return f"{self.partition}/{self.rule.name}-seed{self.recipe.seed}"


def trials(small: bool = False) -> list[Trial]:
    """All cells, the most telling first, so that an interrupted comparison is worth its time."""
    if small:
        rules = [rule for rule in RULES if rule.name in SMALL_RULES]
        return [Trial(rule, "natural", parse_recipe(DEMO, [*SMALL_CHANGES, *rule.changes])) for rule in rules]
    planned, (first, *others) = [], SEEDS
    for main, seed in ((True, first), (False, first), *((True, seed) for seed in others)):
        for partition, rule in product(PARTITIONS, (rule for rule in RULES if rule.main == main)):
            keys = f"seed={seed}", f'name="{partition}-{rule.name}-seed{seed}"'
            recipe = parse_recipe(DEMO, [*CHANGES, *PARTITIONS[partition], *rule.changes, *keys])
            planned.append(Trial(rule, partition, recipe))
    return planned


def strategies(bench: Bench, out: Path | None = None) -> None:
    """Runs the cells that the benchmark's folder lacks, compares all, and leaves out those that fail (or diverge)."""
    if out is None:
        out = new_folder(RUNS, "bench-strategies-small") if bench.small else RUNS / "bench-strategies"
    planned, results = trials(bench.small), []
    for number, trial in enumerate(planned, 1):
        folder = out / trial.name
        if finished_rounds(folder) is None:
            bench.say(f"cell {number} of {len(planned)}: {trial.name}")
            try:
                experiments.run(trial.recipe, out=folder, resume=(folder / "recipe.toml").exists())
            except ValueError as error:
                bench.say(f"{trial.name} is left out: {error}")
                continue
        if (folder / "recipe.toml").read_text(encoding="utf-8") != to_toml(trial.recipe):
            raise RunError(f"{folder} was run with another recipe than the benchmark's: move it away, or remove it")
        results.append(result := read_result(folder, trial.rule.name, trial.partition, trial.recipe))
        compare(results, out)
        bench.add(f"{result.partition} {result.rule} seed {result.seed}", result.heldout, "nats per token, held-out")
    bench.say(f"{len(results)} cells: {out / 'table.md'}, {out / 'report.html'}, {out / 'cells.parquet'}")


class Result(NamedTuple):
    """A cell's figures: losses in nats per token at the end, bytes a client and round, median seconds; NaN: none."""

    partition: str
    rule: str
    seed: int
    rounds: int
    before: float
    heldout: float
    unseen: float
    worst_tenth: float  # the mean of the tenth of the clients that has the highest losses
    personal: float  # of each client on the model that it would use: a personal one once it has it, else the global one
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
    worst, personal_worst = (worst_tenth(list(each.values())) for each in (losses, used))
    mean = sum(used[client] * tokens[client] for client in used) / sum(tokens[client] for client in used)
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
    pq.write_table(pa.Table.from_pylist([result._asdict() for result in results]), sink)
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
