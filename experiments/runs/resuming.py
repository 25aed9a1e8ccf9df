"""The folder of a run, and what must be unchanged for an earlier run to continue there."""

import json
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.messages.errors import RunError
from engine.records.journal import JOURNAL
from engine.system.atomic import write_file
from experiments.config.recipe import Recipe, parse_recipe, to_toml
from experiments.report.run_folder import refuse_ways_out

RUNS = Path("runs")
FINISHED = "finished.json"  # written last: the rounds that the model, the samples and the report are of
# Keys that may change when a run is resumed: no bit of the result depends on them, unless clients fail.
FREE = {
    "clients.max_failed",
    "clients.num_cpus",
    "clients.retries",
    "clients.slots",
    "clients.timeout_s",
    "clients.zero.gangs",
    "clients.zero.timeout_s",
    "data.cache",
}


def run_folder(recipe: Recipe, out: Path | None, resume: bool) -> tuple[Path, Recipe]:
    """The run's folder, and the recipe with the values that an earlier part of the run has measured for "auto".

    Raises RunError if the folder holds a run that must not be overwritten, or none to resume.
    """
    if out is None:
        begun = RUNS.glob(f"{recipe.name}-{'[0-9]' * 8}-{'[0-9]' * 6}/recipe.toml")
        earlier = sorted(path.parent for path in begun)
        if resume and not earlier:
            raise RunError(f"there is no run of {recipe.name!r} in {RUNS} to resume: leave --resume out to start one")
        out = earlier[-1] if resume else RUNS / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    old = out / "recipe.toml"
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "already holds a run" if old.exists() else "exists and is not empty"
            raise RunError(f"{out} {what}: choose another --out, or continue that run with --resume")
        return out, recipe
    if not old.is_file():
        raise RunError(f"{out} holds no run to resume (no recipe.toml): leave --resume out to start one there")
    refuse_ways_out(out)
    before = _begun_with(old, recipe)
    if recipe.rounds <= before.rounds == finished_rounds(out):
        raise RunError(f"the run in {out} has finished; raise rounds, or choose another --out for a new one")
    if recipe.clients.lanes == "auto":  # has been measured
        recipe = replace(recipe, clients=replace(recipe.clients, lanes=before.clients.lanes))
    changed = _differences(before, recipe)
    if changed == ["rounds"] and recipe.rounds < before.rounds:
        raise RunError(f"the run in {out} was begun with {before.rounds} rounds and cannot continue with fewer")
    if changed == ["rounds"] and not _by_rounds(recipe):
        changed = []
    if changed:
        raise RunError(
            f"{out} was begun with another recipe, which differs in {', '.join(changed)}: resume it with the recipe it "
            f"was begun with ({old}), or choose another --out"
        )
    return out, recipe


def mark_finished(folder: Path, rounds: int) -> None:
    """Writes that a run has all that its end leaves, after `rounds` rounds: the last file that a run writes."""
    write_file(folder / FINISHED, json.dumps({"rounds": rounds}).encode())


def finished_rounds(folder: Path) -> int | None:
    """The rounds after which a run has finished, as it says itself; None if it has not, or the file is damaged.

    It may have gone on since: it has finished only if these are the rounds of its recipe.
    """
    try:
        rounds = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["rounds"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return rounds if isinstance(rounds, int) else None


def refuse_other_parts(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Raises RunError if rows, versions, base or code have changed since the run was begun; returns all its digests."""
    file = folder / "manifest.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        key, versions = before["data"]["key"], before["versions"]
        digests: dict[str, str] = dict(before.get("digests", {}))  # runs of earlier versions have none
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is not the manifest of a run ({error}): choose another --out") from error
    if key != manifest["data"]["key"]:
        raise RunError(f"the data has changed since the run in {folder} was begun: choose another --out")
    if versions != manifest["versions"]:
        raise RunError(
            f"the run in {folder} was begun with other versions ({versions}, now {manifest['versions']}): "
            f"install those, or choose another --out"
        )
    known: dict[str, str] = digests | manifest["digests"]
    changed = [name for name, digest in digests.items() if known[name] != digest]
    if changed:
        raise RunError(
            f"{' and '.join(changed)} changed since the run in {folder} was begun: restore what it was begun with, or "
            f"choose another --out (with model.revision set, a base from the hub never changes)"
        )
    return known


def second_sums(folder: Path, recipe: Recipe, manifest: dict[str, Any]) -> tuple[str, ...]:
    """Notes on other sums of the same clients that can be compared with those of a run in mode "full"."""
    if recipe.privacy.secagg.mode != "full":
        return ()
    notes = []
    if recipe.evaluate.without_privacy:
        notes.append(
            "evaluate.without_privacy plays the same rounds again in the clear, and both together reveal what secure "
            "aggregation hides (docs/privacy.md): use it for study only"
        )
    if names := _runs_beside(folder, manifest):
        few = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        notes.append(
            f"{few} had sums of the same clients with the same data and seed, and two sums that differ by one client "
            f"may reveal its update (docs/privacy.md)"
        )
    return tuple(notes)


def _runs_beside(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The names of other runs whose server has had sums of the same data with the same seed, or each update."""
    names = []
    for file in sorted(folder.resolve().parent.glob("*/manifest.json")):
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
            same = other["seed"] == manifest["seed"] and other["data"]["key"] == manifest["data"]["key"]
            if same and file.parent.name != folder.name and _had_sums(file.parent):
                names.append(file.parent.name)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue
    return names


def _had_sums(run: Path) -> bool:
    if any(run.glob(f"{JOURNAL}/*.json")):
        return True
    text = (run / "recipe.toml").read_text(encoding="utf-8") if any(run.glob("checkpoints/[0-9]*")) else None
    return text is not None and tomllib.loads(text).get("privacy", {}).get("secagg", {}).get("mode", "off") == "off"


def _begun_with(file: Path, recipe: Recipe) -> Recipe:
    """The recipe of a run folder, which may be foreign: only user classes that `recipe` names too are imported."""
    try:
        text = file.read_text(encoding="utf-8")
        named = _user_kinds(tomllib.loads(text)) - _user_kinds(tomllib.loads(to_toml(recipe)))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is not the recipe of a run ({error}): choose another --out") from error
    if named:
        raise RunError(
            f"{file} names code that the recipe to resume with does not ({', '.join(sorted(named))}): "
            f"resume it with the recipe it was begun with, or choose another --out"
        )
    return parse_recipe(text, origin=str(file))


def _user_kinds(tree: Any) -> set[str]:
    """The strings of a recipe's tree that may name a user's class, as "module:Class"."""
    if isinstance(tree, str):
        return {tree} if ":" in tree and "/" not in tree else set()
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return set[str]().union(*map(_user_kinds, values))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def _differences(before: Recipe, now: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ, without those that cannot change the result."""
    old, new = (leaves(tomllib.loads(to_toml(recipe))) for recipe in (before, now))
    changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    return sorted(key for key in changed if not _is_free(key, old.get(key), new.get(key)))


def _is_free(key: str, before: Any, now: Any) -> bool:
    if key == "clients.num_gpus":  # a GPU computes other bits than a CPU
        return bool(before and now)
    return key in FREE or key.startswith(("evaluate.", "checkpoint."))


def _by_rounds(recipe: Recipe) -> bool:
    """Whether rounds depend on their total number: by a schedule over rounds, or by noise calibrated for all."""
    return recipe.train.over_rounds.kind != "constant" or recipe.privacy.dp.kind != "none"
