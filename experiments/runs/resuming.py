"""The folder of a run: its lock, and what must be unchanged for an earlier run to continue there."""

import fcntl
import json
import os
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from engine.messages.errors import RunError
from engine.records.journal import JOURNAL
from engine.system.atomic import write_file
from experiments.config.recipe import Recipe, located, parse_recipe, to_toml
from experiments.report.run_folder import leaves, refuse_ways_out
from experiments.runs.digests import asks_for_today

RUNS = Path("runs")
FINISHED = "finished.json"  # written last: the rounds that the model, the samples and the report are of
# Keys that may change when a run is resumed: no bit of the result depends on them, unless clients fail.
FREE = {"clients.max_failed", "clients.num_cpus", "clients.retries", "clients.slots", "clients.timeout_s", "data.cache"}
FREE |= {"clients.zero.gangs", "clients.zero.timeout_s", "model.access.max_cost"}
# These decide which rows are judged, and one table compares the losses of all rounds.
JUDGED = {"evaluate.rows", "evaluate.server_rows"}


def run_folder(recipe: Recipe, out: Path | None, resume: bool) -> tuple[Path, Recipe]:
    """The run's folder, and the recipe with what its start has settled; RunError if a run blocks it or is missing.

    The start settles what was measured for "auto", and the date that chat templates write.
    """
    if out is None:
        if not resume:
            return new_folder(RUNS, recipe.name), recipe
        earlier = sorted(RUNS.glob(f"{recipe.name}-{'[0-9]' * 8}-{'[0-9]' * 6}*/recipe.toml"))
        if not earlier:
            raise RunError(f"there is no run of {recipe.name!r} in {RUNS} to resume: leave --resume out to start one")
        out = earlier[-1].parent
    old = out / "recipe.toml"
    if not resume:
        # What a run leaves that was killed while it wrote its first file does not count.
        if out.exists() and not (out.is_dir() and all(path.match(".recipe.toml.*") for path in out.iterdir())):
            what = "already holds a run" if old.exists() else "exists and is not empty"
            raise RunError(f"{out} {what}: choose another --out, or continue that run with --resume")
        return out, _on_a_day(recipe)
    if not old.is_file():
        raise RunError(f"{out} holds no run to resume (no recipe.toml): leave --resume out to start one there")
    refuse_ways_out(out)
    before = _begun_with(old, recipe)
    if recipe.rounds <= before.rounds == finished_rounds(out):
        raise RunError(f"the run in {out} has finished; raise rounds, or choose another --out for a new one")
    if recipe.clients.lanes == "auto":  # has been measured
        recipe = replace(recipe, clients=replace(recipe.clients, lanes=before.clients.lanes))
    if recipe.model.template_date is None:  # has been set
        recipe = replace(recipe, model=replace(recipe.model, template_date=before.model.template_date))
    old_keys, keys = (leaves(tomllib.loads(to_toml(each))) for each in (before, recipe))
    changed = {key for key in old_keys.keys() | keys.keys() if old_keys.get(key) != keys.get(key)} - FREE
    if before.clients.num_gpus and recipe.clients.num_gpus:  # but a GPU computes other bits than a CPU
        changed.discard("clients.num_gpus")
    changed -= {key for key in changed - JUDGED if key.startswith(("evaluate.", "checkpoint."))}
    if changed == {"rounds"} and recipe.rounds < before.rounds:
        raise RunError(f"the run in {out} was begun with {before.rounds} rounds and cannot continue with fewer")
    # Rounds depend on their total number by a schedule over rounds, or by noise that is calibrated for all of them.
    by_rounds = recipe.train.over_rounds.kind != "constant" or recipe.privacy.dp.kind != "none"
    if changed and (by_rounds or changed != {"rounds"}):
        what = f"{out} was begun with another recipe, which differs in {', '.join(sorted(changed))}"
        raise RunError(f"{what}: resume it with the recipe it was begun with ({old}), or choose another --out")
    return out, recipe


def new_folder(parent: Path, name: str) -> Path:
    """Makes the folder parent/NAME-TIME; waits for the next second if another command has just made it."""
    while True:
        folder = parent / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
            time.sleep(0.1)
        else:
            return folder


def _on_a_day(recipe: Recipe) -> Recipe:
    """The recipe with today's date, if its chat template may ask for it."""
    model = located(recipe).model
    if model.template_date is not None or not asks_for_today(model):
        return recipe
    return replace(recipe, model=replace(recipe.model, template_date=date.today().isoformat()))


def mark_finished(folder: Path, rounds: int) -> None:
    """Writes that a run has all that its end leaves, after `rounds` rounds: the last file that a run writes."""
    write_file(folder / FINISHED, json.dumps({"rounds": rounds}).encode())


def finished_rounds(folder: Path) -> int | None:
    """The rounds after which a run has finished, perhaps to go on with a recipe of more; None if it never has."""
    rounds = facts_of(folder / FINISHED).get("rounds")
    return rounds if isinstance(rounds, int) else None


def earlier_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run to resume by dotted keys; empty if the run was killed before it wrote one."""
    file = folder / "manifest.json"
    if not file.exists() and not any((folder / "checkpoints").glob("[0-9]*")):
        return {}
    facts = facts_of(file)
    if "data.key" not in facts:
        raise RunError(f"{file} is not the manifest of a run: choose another --out")
    return facts


def continued(folder: Path, before: dict[str, Any], manifest: dict[str, Any], accept: bool) -> dict[str, Any]:
    """The manifest of a run that continues the manifest `before` (by dotted keys); it lists accepted changes.

    Raises RunError if the rows have changed, or, unless `accept` is set, versions, the base, code, or the trace.
    """
    now = leaves(manifest)
    if before.get("data.key", now["data.key"]) != now["data.key"]:
        raise RunError(f"the data has changed since the run in {folder} was begun: choose another --out")
    # Earlier digests stay: a base from the hub has none until it is downloaded.
    known = {key.removeprefix("digests."): value for key, value in before.items() if key.startswith("digests.")}
    changed = [key for key, value in known.items() if manifest["digests"].get(key, value) != value]
    versions = {key: value for key, value in before.items() if key.startswith("versions.")}
    changed += [f"{key} ({value}, now {now[key]})" for key, value in versions.items() if now.get(key, value) != value]
    if changed and not accept:
        remedy = "restore what it was begun with, choose another --out, or give --accept-changes to continue in spite "
        remedy += "of that, which the report will show (with model.revision set, a base from the hub never changes)"
        raise RunError(f"{' and '.join(changed)} changed since the run in {folder} was begun: {remedy}")
    accepted = before.get("accepted_changes", [])
    accepted = [*(accepted if isinstance(accepted, list) else []), *changed]
    return manifest | {"digests": known | manifest["digests"]} | ({"accepted_changes": accepted} if accepted else {})


def second_sums(folder: Path, recipe: Recipe, manifest: dict[str, Any]) -> tuple[str, ...]:
    """Notes on other sums of the same clients that can be compared with those of a run in mode "full"."""
    if recipe.privacy.secagg.mode != "full":
        return ()
    notes: tuple[str, ...] = ()
    if recipe.evaluate.without_privacy:
        risk = "both together reveal what secure aggregation hides (docs/privacy.md): use it for study only"
        notes += (f"evaluate.without_privacy plays the same rounds again in the clear, and {risk}",)
    same = manifest["seed"], manifest["data"]["key"]
    names = [
        file.parent.name
        for file in sorted(folder.resolve().parent.glob("*/manifest.json"))
        if (facts := facts_of(file)) and (facts.get("seed"), facts.get("data.key")) == same
        if file.parent.name != folder.name and _had_sums(file.parent)
    ]
    if names:
        few = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        risk = "two sums that differ by one client may reveal its update (docs/privacy.md)"
        notes += (f"{few} had sums of the same clients with the same data and seed, and {risk}",)
    return notes


def facts_of(file: Path) -> dict[str, Any]:
    """The values of a JSON or TOML file by their dotted keys; none if it is missing, damaged, or no object."""
    read = tomllib.loads if file.suffix == ".toml" else json.loads
    try:
        return leaves(read(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}


def _had_sums(run: Path) -> bool:
    """Whether a run's server has had sums of clients: unmasked ones, or without secure aggregation those of rounds."""
    if any(run.glob(f"{JOURNAL}/*.json")):
        return True
    recipe = facts_of(run / "recipe.toml")
    return bool(recipe) and any(run.glob("checkpoints/[0-9]*")) and recipe.get("privacy.secagg.mode", "off") == "off"


def _begun_with(file: Path, recipe: Recipe) -> Recipe:
    """The recipe of a run folder, which may be foreign: only user classes that `recipe` names too are imported."""
    try:
        text = file.read_text(encoding="utf-8")
        named = _user_kinds(tomllib.loads(text)) - _user_kinds(tomllib.loads(to_toml(recipe)))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is not the recipe of a run ({error}): choose another --out") from error
    if named:
        what = f"{file} names code that the recipe to resume with does not ({', '.join(sorted(named))})"
        raise RunError(f"{what}: resume it with the recipe it was begun with, or choose another --out")
    return parse_recipe(text, origin=str(file))


def _user_kinds(tree: Any) -> set[str]:
    """The strings of a recipe's tree that may name a user's class, as "module:Class"."""
    if isinstance(tree, str):
        return {tree} if ":" in tree and "/" not in tree else set()
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return set[str]().union(*map(_user_kinds, values))


class Lock:
    """Keeps other processes, and cleaners of temporary files that respect locks, from a folder until it is deleted."""

    def __init__(self, descriptor: int, location: str) -> None:
        self.descriptor = descriptor
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another command on this machine is working on {location}"
            raise RunError(f"{what}: wait for its end, or choose another --out") from None
        except OSError:
            pass  # some network file systems cannot lock folders

    def __del__(self) -> None:
        os.close(self.descriptor)


# The locks of this process, which may continue a run while the error that ended it still refers to its lock.
_LOCKS: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


def locked(folder: Path, location: str) -> Lock:
    """The lock of a folder, which errors call `location`; RunError while another process has it."""
    lock = _LOCKS.get(folder) or Lock(os.open(folder, os.O_RDONLY), location)
    _LOCKS[folder] = lock
    return lock


@contextmanager
def alone_in(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Makes and locks a run folder, and removes it if it is still empty at the end; RunError as `locked`.

    A `new` one has been made for this run.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()] if not new else [folder, folder.parent]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder.resolve(), str(folder))
    except OSError as error:
        raise RunError(f"{folder} cannot be a run folder ({error}): choose another --out") from error
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()
        del lock  # now, though an error may refer to this frame
