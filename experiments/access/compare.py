"""`fedpost access RECIPE`: all levels of a recipe on the same rows, and what each costs its clients."""

import json
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.messages.errors import RunError
from engine.records.metrics import loss_table
from engine.system.atomic import write_file
from experiments.access.alone import score_alone
from experiments.access.autonomy import tried_again
from experiments.access.measured import Measured, measured
from experiments.access.page import show_table, write_page
from experiments.config.recipe import Recipe
from experiments.openness.gate import FILE, card_of
from experiments.preflight.processes import in_fresh_process
from experiments.report.terminal import say
from experiments.sweep.runner import Listener, refuse_failed, run_all
from experiments.sweep.variants import load_variants

TABLE, PAGE = "access.parquet", "access.html"
# What all runs share, so that their losses are of the same rows and clients; rounds and training may differ.
SHARED = ("seed", "data", "cohort", "evaluate", "gate")


def compare(
    path: Path,
    changes: list[str] | None,
    only: Collection[str],
    out: Path | None,
    listener: Listener,
    stop: threading.Event | None,
    other: str | None = None,
    close: Callable[[], None] = lambda: None,
) -> Path:
    """Runs the variants, prints the table and writes it with a page; returns the folder. RunError names failed runs.

    With `other` the base's owner puts that base in the place of its own, in runs beside these. `close` is called before
    the table is printed.
    """
    from experiments.runs.api import build_store
    from experiments.runs.resuming import new_folder

    recipes = load_variants(path, changes, only)
    refuse_unlike(recipes)
    first = next(iter(recipes.values()))
    folder = out or new_folder(Path("runs"), f"{path.stem}")
    children = run_all(recipes, folder, listener, stop)
    finished = [child for child in children if child.failed is None]
    if finished:
        autonomy = tried_again({child.name: recipes[child.name] for child in finished}, folder, listener, other)
        close()
        memory = in_fresh_process(client_memory, [recipes[child.name] for child in finished])
        runs = []
        for child, nbytes in zip(finished, memory, strict=True):
            recipe = recipes[child.name]
            store = build_store(recipe, without=_refused(child.folder))
            alone = in_fresh_process(score_alone, recipe, child.folder, store)
            if alone is None and recipe.model.peft.plugs_in:  # what is left is the emulator
                alone = loss_table(child.folder / "metrics", recipe.rounds)["emulator"]["unseen"]
            run = measured(child.name, recipe, child.folder, store, nbytes, alone)
            runs.append(replace(run, autonomy=autonomy[child.name]))
        write(runs, first, folder, {child.name: child.failed for child in children if child.failed is not None})
    refuse_failed(children)
    return folder


def write(runs: list[Measured], recipe: Recipe, folder: Path, failed: Mapping[str, str]) -> None:
    """Prints the table, and writes it as Parquet and as a page."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([run.columns() for run in runs]), sink)
    write_file(folder / TABLE, sink.getvalue().to_pybytes())
    facts = json.loads((folder / runs[0].name / FILE).read_text(encoding="utf-8"))
    refused = facts["refused_clients"], facts["refused_rows"]
    title = f"Levels of access to {recipe.model.public_base}"
    write_page(title, runs, card_of(recipe.model.base), refused, folder / PAGE, dict(failed))
    show_table(runs)
    say(f"the page: {folder / PAGE}")


def refuse_unlike(recipes: Mapping[str, Recipe]) -> None:
    """Raises RunError if runs would not be of the same rows, clients and cohorts."""
    first_name, first = next(iter(recipes.items()))
    for name, recipe in recipes.items():
        for key in SHARED:
            if getattr(recipe, key) != getattr(first, key):
                raise RunError(
                    f"the variants {first_name!r} and {name!r} differ in {key}, and losses are compared on the same "
                    f"rows: leave {key} out of [sweep.variants]"
                )
        if recipe.model.base != first.model.base:
            raise RunError(f"the variants {first_name!r} and {name!r} have other bases: compare one base at a time")


def client_memory(recipes: list[Recipe]) -> list[float]:
    """The bytes of a client's process for each recipe, as `fedpost plan` counts them."""
    from experiments.config.recipe import located
    from experiments.preflight.plan import meta_network, sizes_of, slot_need

    needs = []
    for recipe in map(located, recipes):
        counts = sizes_of(meta_network(recipe.model), recipe.model, recipe.train.max_length)
        need = slot_need(counts, recipe, 0.0)
        holds = recipe.model.access.home or recipe.model.peft.plugs_in
        needs.append(need.total if holds else need._replace(weights=0.0, activations=0.0).total)
    return needs


def _refused(folder: Path) -> tuple[str, ...]:
    facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return tuple(sorted(facts["refused"]))
