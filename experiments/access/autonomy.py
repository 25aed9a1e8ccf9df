"""What clients can count on when the base's owner acts: the same answers, another base, less access."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.compute as pc

from engine.config.access import Access, ReplaceBase
from engine.config.access_checks import needs_of
from engine.records.metrics import read_log
from experiments.config.recipe import Recipe
from experiments.sweep.runner import Listener, run_all
from strategies.core.access import GRANTS, LEVELS

TRIED = ("words", "ends", "lora")  # variants that are run again
ROUNDS = 2


@dataclass(frozen=True)
class Autonomy:
    """In words: whether a second run has the same bits, what another base does, and what less access stops.

    `again` and `replaced` are None where they were not tried.
    """

    again: str | None = None
    replaced: str | None = None
    lowered: str = ""


def tried_again(
    recipes: Mapping[str, Recipe], folder: Path, listener: Listener, other: str | None
) -> dict[str, Autonomy]:
    """Runs the first rounds of some variants again below `folder`; with `other` also with that base in the middle."""
    chosen = {name: recipe for name, recipe in recipes.items() if name in TRIED}
    short = {name: replace(recipe, rounds=min(ROUNDS, recipe.rounds)) for name, recipe in chosen.items()}
    children = {child.name: child for child in run_all(short, folder / "again", listener)}
    replaced = {}
    if other is not None:
        swapped = {
            name: with_replaced(recipe, other) for name, recipe in chosen.items() if not recipe.model.access.home
        }
        swapped = {name: recipe for name, recipe in swapped.items() if not recipe.model.peft.plugs_in}
        replaced = {child.name: child for child in run_all(swapped, folder / "replaced", listener)}
    results = {}
    for name, recipe in recipes.items():
        again = None
        if name in children:
            why = children[name].failed
            again = why or same_again(folder / name, children[name].folder, short[name].rounds)
        swap = replaced.get(name)
        effect = None if swap is None else swap.failed or replaced_effect(swap.folder, recipe.rounds)
        results[name] = Autonomy(again, effect, lowered(recipe))
    return results


def same_again(first: Path, second: Path, rounds: int) -> str:
    """Whether all that was measured of clients in training is the same in two runs, or the first round that differs."""
    tables = []
    for folder in (first, second):
        table = read_log(folder / "metrics").filter((pc.field("split") == "train") & (pc.field("round") <= rounds))
        tables.append(table.select(["round", "client", "name", "value"]))
    if tables[0].equals(tables[1]):
        return f"the same bits in {rounds} rounds"
    for round_ in range(1, rounds + 1):
        ours, theirs = (table.filter(pc.field("round") == round_) for table in tables)
        if not ours.equals(theirs):
            return f"differs from round {round_} on"
    return f"the same bits in {rounds} rounds"


def with_replaced(recipe: Recipe, other: str) -> Recipe:
    """The recipe whose provider puts another base in the place of its own in the middle of the run."""
    access: Access = recipe.model.access
    event = ReplaceBase(round=recipe.rounds // 2 + 1, to=other)
    return replace(recipe, model=replace(recipe.model, access=replace(access, events=(*access.events, event))))


def replaced_effect(folder: Path, rounds: int) -> str:
    """What replacing the base did to the training loss, when it recovered, and in which round it was noticed."""
    table = read_log(folder / "metrics")
    means = table.filter((pc.field("split") == "train") & (pc.field("name") == "loss") & pc.field("client").is_null())
    losses = dict(zip(means["round"].to_pylist(), means["value"].to_pylist(), strict=True))
    at = rounds // 2 + 1
    before, after = losses[at - 1], losses[at]
    better = [round_ for round_ in range(at, rounds + 1) if losses[round_] <= before]
    recovered = f"recovered in round {better[0]}" if better else "never recovered"
    faults = read_log(folder / "faults").to_pylist() if (folder / "faults").is_dir() else []
    noticed = [fault["round"] for fault in faults if fault["kind"] == "provider"]
    seen = f"noticed in round {noticed[0]}" if noticed else "not noticed"
    return f"training loss {before:.3f} to {after:.3f}, {recovered}, {seen}"


def lowered(recipe: Recipe) -> str:
    """Below which levels the recipe stops."""
    if recipe.model.access.home:
        return "nobody can lower it"
    needs, granted = needs_of(recipe), GRANTS[recipe.model.access.level]
    lower = [level for level in LEVELS if GRANTS[level] < granted]
    if not lower:
        return "there is no lower level"
    stops = [level for level in lower if not needs <= GRANTS[level]]
    return f"stops at {', '.join(stops)}" if stops else "goes on at each lower level"
