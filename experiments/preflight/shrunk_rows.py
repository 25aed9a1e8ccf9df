"""Rows for a shrunk recipe: shortened rows of some of its clients, or random ones if its data is not here."""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from datasets_partition import Sources
from datasets_partition.core.canonical import content_columns
from datasets_partition.sources.location import is_local
from datasets_partition.sources.python_docs import PythonDocs
from datasets_partition.store.build import build
from datasets_partition.store.store import Store
from experiments.config.recipe import Recipe
from experiments.preflight.shrunk_recipe import ROWS
from strategies.core.seeds import rng

TOO_MUCH = 256 * 2**20  # bytes of files that take too long to read
TURNS = 4


class Drawn(NamedTuple):
    """A table of rows with their clients, whether they are real rows of the recipe, and their origin in words."""

    table: pa.Table
    real: bool
    said: str


def draw_rows(recipe: Recipe, clients: int, max_length: int, cache: Path) -> Drawn:
    """Rows for `clients` clients, short enough for `max_length` tokens of any tokenizer.

    If the recipe's rows are here, its source, partition and splits are tried, with a store in `cache`; their errors are
    raised.
    """
    data, why = recipe.data, out_of_reach(recipe)
    counts = [ROWS * (1 + client % 2) for client in range(clients)]
    names = pa.array([f"{client:05d}" for client, count in enumerate(counts) for _ in range(count)])
    few = max(1, max_length // 8)  # characters: each has up to four tokens, if tokens are bytes
    if why is not None:
        draw, columns = rng(0, 0, -1, "sample"), {"client": names}
        for name, letters in (("prompt", few), ("completion", 2 * few)):
            columns[name] = pa.array(["".join(map(chr, draw.integers(97, 123, letters))) for _ in names])
        return Drawn(pa.table(columns), False, f"made-up prompts and completions, since {why}")
    # Of the documentation only the standard library's, which takes seconds.
    source = replace(data.source, packages=()) if isinstance(data.source, PythonDocs) else data.source
    store = Store.open(build(source, data.partition, data.splits, recipe.seed, str(cache), label=data.label))
    if source is data.source:
        recipe.cohort.sample(store.num_training, recipe.seed, 0)  # raises an error if the cohort is too large
    kept = content_columns(store.read_rows(0, "train"))
    parts = []
    for client, count in enumerate(counts):
        rows = store.read_rows(client % store.num_training, "train").select(kept)
        parts.append(rows.take(np.arange(count) % rows.num_rows))
    table = pa.concat_tables(parts)
    short = {name: _shortened(table[name], name, few) for name in kept}
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
        return [turn | {"content": turn["content"][: few // 2]} for turn in value[: last + 1][-TURNS:]]

    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([text[-few:] if name == "prompt" else text[: 2 * few] for text in values.to_pylist()], kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.array([turns(value) for value in values.to_pylist()], kind)
    return values.combine_chunks()
