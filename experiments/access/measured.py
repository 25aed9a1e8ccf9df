"""What a run at a level of access has cost and reached, from its folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.store.store import Store
from engine.records.exposures import FOLDER
from engine.records.metrics import loss_table, read_log, round_files
from experiments.access.autonomy import Autonomy
from experiments.config.recipe import Recipe
from strategies.core.access import BOXES, GRANTS

JUDGED = ("heldout", "unseen")


@dataclass(frozen=True)
class Measured:
    """One row of the comparison: bytes are those of a client in a round, rows those that went to the base's owner.

    `alone` is the loss on unseen clients by what clients hold, in a process without the owner; None: there is none.
    """

    name: str
    level: str
    box: str
    strategy: str
    kind: str
    rounds: int
    before: dict[str, float]
    after: dict[str, float]
    down: float
    up: float
    rows: int
    distinct: int
    training_rows: int
    tokens: int
    cost: float | None
    currency: str | None
    forward: int
    backward: int
    seconds: float
    memory: float
    sums: bool
    alone: float | None
    lost: tuple[str, ...]
    autonomy: Autonomy = field(default_factory=Autonomy)

    @property
    def share(self) -> float:
        """The share of the training rows that the owner has seen."""
        return self.distinct / max(1, self.training_rows)

    def columns(self) -> dict[str, Any]:
        """The row as flat columns."""
        apart = ("before", "after", "lost", "autonomy")
        flat = {key: value for key, value in vars(self).items() if key not in apart} | vars(self.autonomy)
        for split in JUDGED:
            flat |= {f"{split}_before": self.before.get(split), f"{split}_after": self.after.get(split)}
        return flat | {"share": self.share, "lost": ", ".join(self.lost)}


def measured(name: str, recipe: Recipe, folder: Path, store: Path, memory: float, alone: float | None) -> Measured:
    """Reads a finished run; `memory` is a client's by the plan, `alone` as in Measured."""
    losses, engine = loss_table(folder / "metrics", recipe.rounds), _engine(folder)
    clients = engine("clients") or 1.0
    shown = read_log(folder / FOLDER) if round_files(folder / FOLDER) else None
    access, passes = recipe.model.access, _passes(recipe)
    counts = Store.open(store)
    training = int(counts.counts("train")[: counts.num_training].sum())
    prices = [access.in_round(round_).price for round_ in range(1, recipe.rounds + 1)]
    currency = next((price.currency for price in prices if price is not None), None)
    return Measured(
        name,
        access.level,
        BOXES[access.level],
        recipe.strategy.kind,
        recipe.model.peft.kind,
        recipe.rounds,
        losses.get("round 0", {}),
        losses.get("end", {}),
        engine("protocol_bytes_down") / clients,
        engine("protocol_bytes_up") / clients,
        *_shown(shown),
        training,
        0 if shown is None else pc.sum(shown["tokens"]).as_py(),
        None if shown is None or currency is None else pc.sum(shown["cost"]).as_py(),
        currency,
        int(clients * passes[0]),
        int(clients * passes[1]),
        engine("round_s"),
        memory,
        recipe.strategy.reads == "sum",
        alone,
        tuple(sorted(GRANTS["weights"] - GRANTS[access.level])),
    )


def _engine(folder: Path) -> Any:
    """Gives the sum over rounds of one of the engine's metrics."""
    table = read_log(folder / "metrics")
    of_engine = table.filter(pc.equal(table["split"], "engine"))

    def total(name: str) -> float:
        return float(pc.sum(of_engine.filter(pc.equal(of_engine["name"], name))["value"]).as_py() or 0.0)

    return total


def _shown(shown: pa.Table | None) -> tuple[int, int]:
    """How many rows were sent, and how many different ones."""
    if shown is None:
        return 0, 0
    return pc.sum(shown["rows"]).as_py(), pc.sum(shown["new_rows"]).as_py()


def _passes(recipe: Recipe) -> tuple[float, float]:
    """How many rows of a step go forward and backward through the model for a client in a round, about."""
    strategy, train = recipe.strategy, recipe.train
    rows = train.batch * train.accumulate * (train.steps or 1)
    if strategy.searches:
        options = vars(strategy)
        candidates = options.get("population", 1 + options.get("mutants", 0)) * options.get("generations", 1)
        return float(rows * candidates), 0.0
    if recipe.model.peft.replays:
        return 2.0 * rows, 0.0
    return float(rows), float(rows)
