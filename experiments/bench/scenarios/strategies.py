"""`fedpost bench strategies`: the demo's model under every rule, on two partitions.

A cell is a rule, a partition and a seed, with a run folder for itself. Finished cells are kept, killed ones go on from
their checkpoints, and table, page and Parquet are written again after each cell.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import experiments
from engine.messages.errors import RunError
from experiments.bench.comparison import compare, read_result
from experiments.bench.harness import DEMO, SMALL_DEMO, Bench
from experiments.bench.rules import RULES, Rule
from experiments.config.recipe import Recipe, parse_recipe, to_toml
from experiments.runs.resuming import RUNS, finished_rounds

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


@dataclass(frozen=True)
class Plan:
    """A cell before it has run."""

    rule: Rule
    partition: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """The cell's folder within the benchmark's."""
        return f"{self.partition}/{self.rule.name}-seed{self.recipe.seed}"


def plans(small: bool = False) -> list[Plan]:
    """All cells, the most telling first, so that an interrupted comparison is worth its time."""
    if small:
        rules = [rule for rule in RULES if rule.name in SMALL_RULES]
        return [Plan(rule, "natural", parse_recipe(DEMO, [*SMALL_CHANGES, *rule.changes])) for rule in rules]
    first, *others = SEEDS
    planned = []
    for main, seed in ((True, first), (False, first), *((True, seed) for seed in others)):
        for partition, changes in PARTITIONS.items():
            for rule in (rule for rule in RULES if rule.main == main):
                name = f'name="{partition}-{rule.name}-seed{seed}"'
                recipe = parse_recipe(DEMO, [*CHANGES, *changes, *rule.changes, f"seed={seed}", name])
                planned.append(Plan(rule, partition, recipe))
    return planned


def strategies(bench: Bench, out: Path | None = None) -> None:
    """Runs the cells that the benchmark's folder lacks and writes the comparison there: each cell's held-out loss.

    A cell whose run fails, for example because it diverges, is named and left out.
    """
    if out is None:
        out = RUNS / (f"bench-strategies-small-{time.strftime('%Y%m%d-%H%M%S')}" if bench.small else "bench-strategies")
    planned, results = plans(bench.small), []
    for number, plan in enumerate(planned, 1):
        folder = out / plan.name
        if finished_rounds(folder) is None:
            bench.say(f"cell {number} of {len(planned)}: {plan.name}")
            try:
                experiments.run(plan.recipe, out=folder, resume=(folder / "recipe.toml").exists())
            except ValueError as error:
                bench.say(f"{plan.name} is left out: {error}")
                continue
        if (folder / "recipe.toml").read_text(encoding="utf-8") != to_toml(plan.recipe):
            raise RunError(f"{folder} was run with another recipe than the benchmark's: move it away, or remove it")
        results.append(result := read_result(folder, plan.rule.name, plan.partition, plan.recipe))
        compare(results, out)
        bench.add(f"{result.partition} {result.rule} seed {result.seed}", result.heldout, "nats per token, held-out")
    bench.say(f"{len(results)} cells: {out / 'table.md'}, {out / 'report.html'}, {out / 'cells.parquet'}")
