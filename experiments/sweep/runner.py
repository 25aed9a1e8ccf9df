"""Runs recipes one after another in one Ray; a sweep that was stopped goes on, and a run that fails stops no other."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.messages.errors import RunError
from engine.messages.events import Event
from engine.system.atomic import write_file
from experiments.config.recipe import Recipe
from experiments.runs.driving import RunStopped, explanation

FAILED = "failed.json"  # why runs have failed, by name

Listener = Callable[[str, Recipe], Callable[[Event], None]]  # of a run's name and recipe: takes its events


@dataclass(frozen=True)
class Child:
    """A run of a sweep: its name and folder, and why it has no result (None: it has)."""

    name: str
    folder: Path
    failed: str | None = None


def run_all(
    recipes: Mapping[str, Recipe],
    out: Path,
    listener: Listener = lambda name, recipe: lambda event: None,
    stop: threading.Event | None = None,
    address: str | None = None,
) -> list[Child]:
    """Runs what has not finished yet below `out`, and returns all in order; RunStopped once `stop` is set.

    A folder that a run has begun in is gone on with; RunError if another command is working there.
    """
    from experiments.runs.api import ray_session, run
    from experiments.runs.resuming import alone_in, finished_rounds

    children = []
    with alone_in(out), ray_session(address):
        for name, recipe in recipes.items():
            folder = out / name
            failed: str | None = None
            if finished_rounds(folder) != recipe.rounds:
                resume = (folder / "recipe.toml").is_file()
                try:
                    run(recipe, out=folder, resume=resume, on_event=listener(name, recipe), stop=stop)
                except RunStopped as stopped:
                    raise RunStopped(f"{name}: {stopped}; the same command goes on") from None
                except Exception as error:
                    failed = explanation(error)
                    if failed is None:
                        raise
            children.append(Child(name, folder, failed))
        failures = {child.name: child.failed for child in children if child.failed is not None}
        write_file(out / FAILED, json.dumps(failures, indent=1).encode())
    return children


def refuse_failed(children: list[Child]) -> None:
    """Raises RunError that names the runs that have failed, if there are any."""
    if failed := [child for child in children if child.failed is not None]:
        raise RunError("\n".join(f"{child.name}: {child.failed}" for child in failed))
