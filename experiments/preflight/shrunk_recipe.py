"""A recipe shrunk to a minute on a laptop: the same sections with few clients, rows and steps, and two rounds."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.parquet_files import ParquetFiles
from engine.messages.errors import RunError
from experiments.config.recipe import Data, Recipe
from strategies import Cohorts
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.errors import StrategyError
from strategies.privacy.central import CentralDp
from strategies.privacy.distributed import DistributedDp

ROUNDS, SLOTS, COHORT, SPARE = 2, 2, 6, 2
ROWS = 8  # of every second client; the others have twice as many
LENGTH = 64
LITTLE_NOISE = 0.01
PATIENCE_S = (120.0, math.inf)  # time limits, since a large machine is faster than this one
# The least and the most that numbers of a section may be; 0, "auto" and what is unset stay.
BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "splits": {"heldout": (1 / ROWS, 0.25), "unseen": (1 / COHORT, 0.5), "server": (1 / ROWS, 0.25)},
    "train": {"steps": (0, 2), "epochs": (0, 1), "batch": (0, 2), "accumulate": (0, 2), "max_length": (0, LENGTH)},
    "over_rounds": {"warmup": (0, ROUNDS)},
    "over_steps": {"warmup": (0, 2)},
    "evaluate": {"every": (0, 1), "rows": (0, 2), "finetune": (0, 1), "server_rows": (0, 4), "batch": (0, 2)},
    "clients": {"slots": (0, SLOTS), "lanes": (0, SLOTS), "timeout_s": PATIENCE_S},
    # Only the clients with twice as many rows go to gangs beside plain slots.
    "zero": {"ranks": (0, 2), "gangs": (0, 1), "from_rows": (10, 10), "timeout_s": PATIENCE_S},
    "availability": {"step_s": (0, 1.0), "deadline_s": PATIENCE_S},
}


def shrunk_recipe(recipe: Recipe, base: Path, folder: Path) -> Recipe:
    """The recipe with the smallest cohort that its strategy and its privacy accept, and with `base` for its base.

    It reads `folder`/rows.parquet, which needs rows of `clients_of` clients.
    """
    last = recipe.cohort.size if isinstance(recipe.cohort, UniformCohort) else 2**12
    cohort = min(COHORT, last)
    while True:
        try:
            return _of_cohort(recipe, base, folder, cohort)
        except (RunError, StrategyError):
            if cohort == last:
                raise
            cohort = min(2 * cohort, last)


def _of_cohort(recipe: Recipe, base: Path, folder: Path, cohort: int) -> Recipe:
    model, train, clients = recipe.model, recipe.train, recipe.clients
    attention = "sdpa" if model.attention == "flash_attention_2" else model.attention
    # Shortened rows may be equal, which is no leak here.
    splits = _bounded("splits", recipe.data.splits, min_rows=1, duplicates="keep", leaks="allow")
    rows = ParquetFiles(path=str(folder / "rows.parquet"))
    drawn: Cohorts = UniformCohort(size=cohort)
    if isinstance(recipe.cohort, PoissonCohort):
        drawn = PoissonCohort(size=cohort, cap=recipe.cohort.cap and 2 * cohort)
    warm_ups = {name: _bounded(name, getattr(train, name)) for name in ("over_rounds", "over_steps")}
    zero = clients.zero and _bounded("zero", clients.zero)
    left = _bounded("availability", clients.availability, trace=None)  # a trace names other clients
    slots = 1 if zero else SLOTS if clients.slots == "auto" else clients.slots
    # Of so few clients each is a large share.
    few = {"slots": slots, "threads": 1, "availability": left, "min_share": 0.0, "zero": zero}
    return replace(
        recipe,
        rounds=ROUNDS,
        model=replace(model, base=str(base), revision=None, compile=False, attention=attention),
        data=Data(rows, Natural(), splits, None, str(folder)),
        clients=_bounded("clients", clients, **few),
        cohort=drawn,
        train=_bounded("train", train, **warm_ups),
        evaluate=_bounded("evaluate", recipe.evaluate),
        checkpoint=replace(recipe.checkpoint, every=1, keep=ROUNDS),
    )


def _bounded(name: str, section: Any, **changes: Any) -> Any:
    """The section with these changes, and with its numbers within their bounds."""
    for key, (least, most) in BOUNDS[name].items():
        value = changes.get(key, getattr(section, key))
        changes[key] = min(max(value, least), most) if value and value != "auto" else value
    return replace(section, **changes)


def clients_of(recipe: Recipe) -> int:
    """How many clients a shrunk recipe needs so that enough of them train."""
    assert recipe.cohort.size is not None
    return math.ceil((recipe.cohort.size + SPARE) / (1 - recipe.data.splits.unseen)) + 1


def bearable(recipe: Recipe, population: int) -> Recipe:
    """The shrunk recipe without what so few clients cannot bear: too much noise, drop-outs that end rounds."""
    dp, cohort, secagg = recipe.privacy.dp, recipe.cohort, recipe.privacy.secagg
    if isinstance(dp, CentralDp):
        try:
            with warnings.catch_warnings(action="ignore"):
                dp.plan(cohort, population, ROUNDS)
        except StrategyError:
            dp = replace(dp, epsilon=None, noise_multiplier=LITTLE_NOISE)
    left = recipe.clients.availability
    for round_ in range(ROUNDS):
        drawn, least = cohort.sample(population, recipe.seed, round_), 1
        if recipe.privacy.secure:
            least = max(secagg.parameters(len(drawn)).threshold, secagg.min_contributors)
        if isinstance(dp, DistributedDp):
            least = max(least, math.ceil(dp.survivors * cohort.expected(population)))
        if len(drawn) - len(left.gone(drawn, recipe.seed, round_)) < least:
            left = replace(left, dropout=0.0)
    clients = replace(recipe.clients, availability=left)
    return replace(recipe, privacy=replace(recipe.privacy, dp=dp), clients=clients)
