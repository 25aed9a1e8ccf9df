"""A recipe shrunk to a minute on a laptop: the same sections with few clients, rows and steps, and two rounds."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.parquet_files import ParquetFiles
from datasets_partition.store.splits import Splits
from engine.config.sections import Clients
from engine.config.train import Train
from engine.messages.errors import RunError
from experiments.config.recipe import Data, Recipe
from strategies import Cohorts
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.errors import StrategyError

ROUNDS, SLOTS, RANKS, COHORT, SPARE = 2, 2, 2, 6, 2
ROWS = 8  # of every second client; the others have twice as many
MANY = 10  # training rows, which only the clients with twice as many rows have
LENGTH = 64
PATIENCE_S = 120.0  # the least time limit, since a large machine is faster than this one
LITTLE_NOISE = 0.01


def shrunk_recipe(recipe: Recipe, base: Path, folder: Path) -> Recipe:
    """The recipe with the smallest cohort that its strategy and its privacy accept, and with `base` for its base.

    It reads `folder`/rows.parquet, which needs rows of `clients_of` clients.
    """
    size = recipe.cohort.size if isinstance(recipe.cohort, UniformCohort) else None
    last = 2**12 if size is None else size
    cohort = min(COHORT, last)
    while True:
        try:
            return _of_cohort(recipe, base, folder, cohort)
        except (RunError, StrategyError):
            if cohort == last:
                raise
            cohort = min(2 * cohort, last)


def _of_cohort(recipe: Recipe, base: Path, folder: Path, cohort: int) -> Recipe:
    model = replace(recipe.model, base=str(base), revision=None, compile=False)
    if model.attention == "flash_attention_2":
        model = replace(model, attention="sdpa")
    rows, splits = ParquetFiles(path=str(folder / "rows.parquet")), _splits(recipe.data.splits)
    drawn: Cohorts = UniformCohort(size=cohort)
    if isinstance(recipe.cohort, PoissonCohort):
        drawn = PoissonCohort(size=cohort, cap=recipe.cohort.cap and 2 * cohort)
    return replace(
        recipe,
        rounds=ROUNDS,
        model=model,
        data=Data(rows, Natural(), splits, None, str(folder)),
        clients=_clients(recipe.clients),
        cohort=drawn,
        train=_train(recipe.train),
        evaluate=_capped(recipe.evaluate, every=1, rows=2, finetune=1, server_rows=4, batch=2),
        checkpoint=replace(recipe.checkpoint, every=1, keep=ROUNDS),
    )


def _train(train: Train) -> Train:
    """Few steps of few rows, with warm-ups that are no longer than they."""
    rounds, steps = _capped(train.over_rounds, warmup=ROUNDS), _capped(train.over_steps, warmup=2)
    few: Train = _capped(train, steps=2, epochs=1, batch=2, accumulate=2, max_length=LENGTH)
    return replace(few, over_rounds=rounds, over_steps=steps)


def _capped(section: Any, **most: float) -> Any:
    """The section with numbers of at most these; None and 0 stay."""
    values = {name: getattr(section, name) for name in most}
    return replace(section, **{name: value and min(value, most[name]) for name, value in values.items()})


def _splits(splits: Splits) -> Splits:
    """Shares that few rows and clients can have; shortened rows may be equal, which is no leak here."""
    return replace(
        splits,
        heldout=splits.heldout and min(max(splits.heldout, 1 / ROWS), 0.25),
        unseen=splits.unseen and min(max(splits.unseen, 1 / COHORT), 0.5),
        server=splits.server and min(max(splits.server, 1 / ROWS), 0.25),
        min_rows=1,
        duplicates="keep",
        leaks="allow",
    )


def _clients(clients: Clients) -> Clients:
    zero = clients.zero
    if zero is not None:
        zero = _capped(zero, ranks=RANKS, gangs=1)
        zero = replace(zero, from_rows=zero.from_rows and MANY, timeout_s=max(zero.timeout_s, PATIENCE_S))
    slots = SLOTS if clients.slots == "auto" else min(clients.slots, SLOTS)
    left = replace(clients.availability, trace=None)  # which names other clients
    if left.deadline_s is not None:
        left = replace(_capped(left, step_s=1.0), deadline_s=max(left.deadline_s, PATIENCE_S))
    return replace(
        clients,
        slots=slots if zero is None else 1,
        threads=1,
        lanes=clients.lanes if clients.lanes == "auto" else min(clients.lanes, SLOTS),
        availability=left,
        min_share=0.0,  # each of so few clients is a large share
        zero=zero,
        timeout_s=clients.timeout_s and max(clients.timeout_s, PATIENCE_S),
    )


def clients_of(recipe: Recipe) -> int:
    """How many clients a shrunk recipe needs so that enough of them train."""
    assert recipe.cohort.size is not None
    return math.ceil((recipe.cohort.size + SPARE) / (1 - recipe.data.splits.unseen)) + 1


def bearable(recipe: Recipe, population: int) -> Recipe:
    """The shrunk recipe without what so few clients cannot bear: too much noise, drop-outs that end rounds."""
    dp, cohort = recipe.privacy.dp, recipe.cohort
    if dp.adds_to == "sum":
        try:
            with warnings.catch_warnings(action="ignore"):
                dp.plan(cohort, population, ROUNDS)
        except StrategyError:
            dp = replace(dp, epsilon=None, noise_multiplier=LITTLE_NOISE)
            recipe = replace(recipe, privacy=replace(recipe.privacy, dp=dp))
    left = recipe.clients.availability
    for round_ in range(ROUNDS):
        drawn, least = cohort.sample(population, recipe.seed, round_), 1
        if recipe.privacy.secure:
            least = recipe.privacy.secagg.parameters(len(drawn)).threshold
            least = max(least, recipe.privacy.secagg.min_contributors)
        if dp.adds_to == "ring":
            least = max(least, math.ceil(dp.survivors * cohort.expected(population)))
        if len(drawn) - len(left.gone(drawn, recipe.seed, round_)) < least:
            left = replace(left, dropout=0.0)
    return replace(recipe, clients=replace(recipe.clients, availability=left))
