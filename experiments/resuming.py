"""Where a run is written, and what must be as it was for an earlier one to go on there."""

import json
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.config import Recipe, parse_recipe, to_toml

RUNS = Path("runs")


def run_folder(recipe: Recipe, out: Path | None, resume: bool) -> tuple[Path, Recipe]:
    """The run's folder, and the recipe with what an earlier part of the run has settled.

    ValueError where the folder holds a run that must not be touched, or lacks the one to be resumed.
    """
    if out is None:
        earlier = sorted(RUNS.glob(f"{recipe.name}-{'[0-9]' * 8}-{'[0-9]' * 6}"))
        if resume and not earlier:
            raise ValueError(f"there is no run of {recipe.name!r} in {RUNS} to resume: leave --resume out to start one")
        out = earlier[-1] if resume else RUNS / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    old = out / "recipe.toml"
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "already holds a run" if old.exists() else "exists and is not empty"
            raise ValueError(f"{out} {what}: choose another --out, or go on with that run by --resume")
        return out, recipe
    if not old.is_file():
        raise ValueError(f"{out} holds no run to resume (no recipe.toml): leave --resume out to start one there")
    if (out / "model").exists():
        hint = "" if (out / "report.html").exists() else f"; `fedpost report {out}` writes the report that it lacks"
        raise ValueError(f"the run in {out} has finished; choose another --out for a new one{hint}")
    before = parse_recipe(old.read_text(encoding="utf-8"), origin=str(old))
    if recipe.clients.pack == "auto":  # has been settled
        recipe = replace(recipe, clients=replace(recipe.clients, pack=before.clients.pack))
    changed = _differences(before, recipe)
    if changed:
        raise ValueError(
            f"{out} was begun with another recipe, which differs in {', '.join(changed)}: resume it with the recipe it "
            f"was begun with ({old}), or start anew in another --out"
        )
    return out, recipe


def refuse_other_data(folder: Path, manifest: dict[str, Any]) -> None:
    """A resumed run must go on with the rows and the versions that it was begun with."""
    before = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if before["data"]["key"] != manifest["data"]["key"]:
        raise ValueError(f"the data has changed since the run in {folder} was begun: start anew in another --out")
    if before["versions"] != manifest["versions"]:
        raise ValueError(
            f"the run in {folder} was begun with other versions ({before['versions']}, now {manifest['versions']}): "
            f"install those, or start anew in another --out"
        )


def _differences(before: Recipe, now: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ, but for those that cannot change the result."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return leaves

    old, new = (flat(tomllib.loads(to_toml(recipe))) for recipe in (before, now))
    free = {
        "clients.max_failed",
        "clients.slots",
        "clients.num_cpus",
        "clients.num_gpus",
        "checkpoint.every",
        "checkpoint.keep",
        "data.cache",
    }
    return sorted(key for key in (old.keys() | new.keys()) - free if old.get(key) != new.get(key))
