"""`fedpost bench strategies`: the demo's model under every rule, on two partitions.

A cell is a rule, a partition and a seed, and one run folder of its own. What has finished is kept, what was killed goes
on from its checkpoint, and table, plot and Parquet are written anew after each cell.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import experiments
from experiments.bench.comparison import compare, read_cell
from experiments.bench.results import Figure, Steps
from experiments.bench.rules import RULES, Rule
from experiments.config.recipe import RECIPES, Recipe, parse_recipe, to_toml
from experiments.runs.api import ray_session
from experiments.runs.resuming import RUNS

PARTITIONS = {
    "natural": (),
    # As many clients as the natural one has, over topics that k-means finds; the demo leaves out those with few rows.
    "topics": ('data.partition={kind="topic", clients=140, topics=10, alpha=0.1}',),
}
SEEDS = (7, 8, 9)
# Short prompts and rows, and judged at round 0 and the end only: 15 rounds of all cells in two hours.
CHANGES = (
    "rounds=15",
    'data.source={kind="python_docs", prompt_chars=200}',
    "train.steps=4",
    "train.max_length=128",
    "evaluate.every=0",
    "evaluate.rows=4",
    "checkpoint.every=5",
)
SMALL_RULES = ("fedavg", "ditto")
SMALL_CHANGES = (
    "rounds=2",
    'data.source={kind="python_docs", packages=[], prompt_chars=60}',
    "cohort.size=2",
    "train.steps=1",
    "train.max_length=64",
    "evaluate.every=0",
    "evaluate.rows=1",
)


@dataclass(frozen=True)
class Plan:
    """A cell before it has run."""

    rule: Rule
    partition: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """As its folder below the benchmark's."""
        return f"{self.partition}/{self.rule.name}-seed{self.recipe.seed}"


def plans(small: bool = False) -> list[Plan]:
    """All cells, those first that tell the most: an interrupted comparison is worth its time."""
    text = (RECIPES / "demo.toml").read_text(encoding="utf-8")

    def cells(rules: list[Rule], seed: int) -> Iterator[Plan]:
        for partition, changes in PARTITIONS.items():
            for rule in rules:
                name = f'name="{partition}-{rule.name}-seed{seed}"'
                yield Plan(
                    rule, partition, parse_recipe(text, [*CHANGES, *changes, *rule.changes, f"seed={seed}", name])
                )

    if small:
        return [
            Plan(rule, "natural", parse_recipe(text, [*SMALL_CHANGES, *rule.changes]))
            for rule in RULES
            if rule.name in SMALL_RULES
        ]
    main = [rule for rule in RULES if rule.main]
    others = [rule for rule in RULES if not rule.main]
    first, *more = SEEDS
    return [*cells(main, first), *cells(others, first), *(cell for seed in more for cell in cells(main, seed))]


def measure(small: bool, out: Path | None = None) -> dict[str, Figure]:
    """Runs the cells that the benchmark's folder lacks and writes the comparison there: each cell's held-out loss.

    A cell that cannot be run to its end (because it diverges, say) is told of and left out.
    """
    if out is None:
        out = RUNS / (f"bench-strategies-small-{time.strftime('%Y%m%d-%H%M%S')}" if small else "bench-strategies")
    listed, cells, steps = plans(small), [], Steps()
    with ray_session(None):
        for number, plan in enumerate(listed, 1):
            folder = out / plan.name
            if not (folder / "model").exists():
                steps.say(f"cell {number} of {len(listed)}: {plan.name}")
                try:
                    experiments.run(plan.recipe, out=folder, resume=(folder / "recipe.toml").exists())
                except ValueError as error:
                    steps.say(f"{plan.name} is left out: {error}")
                    continue
            _refuse_other(plan, folder)
            cells.append(read_cell(folder, plan.rule.name, plan.partition, plan.recipe))
            compare(cells, out)
    steps.say(f"{len(cells)} cells: {out / 'table.md'}, {out / 'plot.png'}, {out / 'cells.parquet'}")
    return {
        f"{cell.partition} {cell.rule} seed {cell.seed}": Figure(cell.heldout, "nats per token, held-out")
        for cell in cells
    }


def _refuse_other(plan: Plan, folder: Path) -> None:
    if (folder / "recipe.toml").read_text(encoding="utf-8") != to_toml(plan.recipe):
        raise ValueError(f"{folder} was run with another recipe than the benchmark's now: move it away, or remove it")
