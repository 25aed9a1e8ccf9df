"""A recipe shrunk to a minute on a laptop: the same sections with few clients, rows and steps, and two rounds."""

import math
import typing
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from datasets_partition import Sources
from datasets_partition.core.types import COLUMNS, IN_WORDS, OPTIONS, content_columns
from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.files import ParquetFiles
from datasets_partition.sources.location import is_local
from datasets_partition.sources.python_docs import PythonDocs
from datasets_partition.store.build import STORED, build
from datasets_partition.store.store import Store
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from experiments.config.recipe import Data, Recipe
from strategies import Cohorts
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.errors import StrategyError
from strategies.core.seeds import rng

ROUNDS, SLOTS, COHORT, SPARE = 2, 2, 6, 2
SCORER = "scorer"  # the folder of a model that scores texts
ROWS = 8  # of every second client; the others have twice as many
LENGTH = 64
PATIENCE_S = (120.0, math.inf)  # time limits, since a large machine is faster than this one
TOO_MUCH = 256 * 2**20  # bytes of files that take too long to read
# The least and the most that numbers of a section may be; 0, "auto" and what is unset stay.
BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "splits": {"heldout": (1 / ROWS, 0.25), "unseen": (1 / COHORT, 0.5), "server": (1 / ROWS, 0.25)},
    "train": {"steps": (0, 2), "epochs": (0, 1), "batch": (0, 2), "accumulate": (0, 2), "max_length": (0, LENGTH)},
    "sampling": {"num_generations": (2, 2), "max_completion_length": (0, LENGTH // 8), "every": (0, 2)},
    "over_rounds": {"warmup": (0, ROUNDS)},
    "over_steps": {"warmup": (0, 2)},
    "evaluate": {"every": (0, 1), "rows": (0, 2), "finetune": (0, 1), "server_rows": (0, 4), "batch": (0, 2)},
    "clients": {"slots": (0, SLOTS), "lanes": (0, SLOTS), "timeout_s": PATIENCE_S},
    # Only the clients with twice as many rows go to gangs beside plain slots.
    "zero": {"ranks": (0, 2), "gangs": (0, 1), "from_rows": (10, 10), "timeout_s": PATIENCE_S},
    "availability": {"step_s": (0, 1.0), "deadline_s": PATIENCE_S},
}


def shrunk_recipe(recipe: Recipe, base: Path, folder: Path) -> Recipe:
    """The recipe over `base` and `folder`/rows.parquet, with the smallest cohort that strategy and privacy accept."""
    last = (not recipe.cohort.varies and recipe.cohort.cap) or 2**12
    cohort = COHORT
    while cohort < last:
        with suppress(RunError, StrategyError):
            return _of_cohort(recipe, base, folder, cohort)
        cohort *= 2
    return _of_cohort(recipe, base, folder, last)


def _of_cohort(recipe: Recipe, base: Path, folder: Path, cohort: int) -> Recipe:
    model, train, clients = recipe.model, recipe.train, recipe.clients
    models = [FrozenModel(str(folder / SCORER if each.scores else base)) for each in train.objective.models]
    objective = train.objective.with_models(models)
    if objective.sampling is not None:
        objective = _bounded("sampling", objective)
    train = replace(train, objective=objective)
    attention = "auto" if model.attention == "flash_attention_2" else model.attention
    # Shortened rows and prompts may be equal, which is no leak here.
    splits = _bounded("splits", recipe.data.splits, min_rows=1, duplicates="keep", leaks="allow", by="row")
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
        model=replace(
            model,
            base=str(base),
            revision=None,
            start=None,
            compile=False,
            attention=attention,
            chat_template=None,
            peft=model.peft.on_few_layers,
            access=replace(model.access, events=(), max_cost=None),  # they may end rounds that are to be tried
        ),
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
    if dp.adds_to == "sum":
        try:
            with warnings.catch_warnings(action="ignore"):
                dp.plan(cohort, population, ROUNDS)
        except StrategyError:
            dp = replace(dp, epsilon=None, noise_multiplier=0.01)
    left = recipe.clients.availability
    for round_ in range(ROUNDS):
        drawn, least = cohort.sample(population, recipe.seed, round_), 1
        if recipe.privacy.secure:
            least = max(secagg.parameters(len(drawn)).threshold, secagg.min_contributors)
        if dp.adds_to == "ring":
            least = max(least, math.ceil(dp.survivors * cohort.expected(population)))
        if len(drawn) - len(left.gone(drawn, recipe.seed, round_)) < least:
            left = replace(left, dropout=0.0)
    privacy, clients = replace(recipe.privacy, dp=dp), replace(recipe.clients, availability=left)
    return replace(recipe, privacy=privacy, clients=clients)


class Drawn(NamedTuple):
    """A table of rows with their clients, whether they are real rows of the recipe, and their origin in words."""

    table: pa.Table
    real: bool
    said: str


def draw_rows(recipe: Recipe, clients: int, max_length: int, cache: Path) -> Drawn:
    """Rows of up to `max_length` tokens: shortened ones of some clients, or made-up ones; raises the data's errors."""
    data, why = recipe.data, out_of_reach(recipe)
    counts = [ROWS * (1 + client % 2) for client in range(clients)]
    names = pa.array([f"{client:05d}" for client, count in enumerate(counts) for _ in range(count)])
    few = max(1, max_length // 8)  # characters: each has up to four tokens, if tokens are bytes
    if why is not None:
        draw, columns = rng(0, 0, -1, "sample"), {"client": names}
        kind = recipe.train.objective.formats[0]
        for name in (*COLUMNS[kind], *(recipe.train.objective.reads or ())):
            letters = few if name == "prompt" else 2 * few
            columns[name] = pa.array(["".join(map(chr, draw.integers(97, 123, letters))) for _ in names])
        if "label" in columns:
            columns["label"] = pa.array([row % 2 == 0 for row in range(len(names))])
        return Drawn(pa.table(columns), False, f"made-up {IN_WORDS[kind]}, since {why}")
    reads = recipe.train.objective.reads
    # Of the documentation only the standard library's, which takes seconds.
    source = replace(data.source, packages=()) if isinstance(data.source, PythonDocs) else data.source
    store = Store.open(
        build(source, data.partition, data.splits, recipe.seed, str(cache), label=data.label, beside=reads)
    )
    if source is data.source:
        recipe.cohort.sample(store.num_training, recipe.seed, 0)  # raises an error if the cohort is too large
    first = store.read_rows(0, "train")
    kept = [name for name in first.column_names if name not in STORED]
    by_client = (store.read_rows(client % store.num_training, "train").select(kept) for client in range(clients))
    table = pa.concat_tables(rows.take(np.arange(n) % rows.num_rows) for rows, n in zip(by_client, counts, strict=True))
    content = {*content_columns(first)} - {OPTIONS}
    short = {name: _shortened(table[name], name, few) if name in content else table[name] for name in kept}
    said = f"the first rows of {min(clients, store.num_training):,} of {store.num_training:,} clients"
    return Drawn(pa.table({"client": names} | short), True, said)


def out_of_reach(recipe: Recipe) -> str | None:
    """Why the recipe's rows cannot be read here; None if they can."""
    source = recipe.data.source
    if not isinstance(source, typing.get_args(Sources)) or isinstance(source, PythonDocs):
        return None
    where = str(vars(source).get("path") or vars(source)["name"])
    path = Path(where).expanduser()
    if not is_local(where) or not path.exists():
        return f"{where} is not on this machine"
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return f"{where} holds {size / 2**30:.1f} GiB" if size > TOO_MUCH else None


def _shortened(values: pa.ChunkedArray, name: str, few: int) -> pa.Array:
    """The values with few characters: the end of a prompt, the beginning of other texts and of each turn."""

    def turns(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Up to the first answer: later turns are not needed.
        last = next((number for number, turn in enumerate(value) if turn["role"] == "assistant"), len(value))
        return [turn | {"content": turn["content"][: few // 2]} for turn in value[: last + 1][-4:]]

    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([text[-few:] if name == "prompt" else text[: 2 * few] for text in values.to_pylist()], kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.array([turns(value) for value in values.to_pylist()], kind)
    return values.combine_chunks()
