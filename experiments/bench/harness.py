"""The harness of all benchmarks: figures, progress on stderr, one folder and one Ray, recipes, timing and gates.

A scenario is a file of `scenarios/` whose `measure(bench)` adds figures to a `Bench`; `scenario` gives it one.
"""

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

import experiments
from engine.messages.events import Event, RoundDone
from experiments.config.recipe import RECIPES, Recipe, parse_recipe
from experiments.report.terminal import say
from experiments.runs.api import Run, ray_session

EVERY_S = 2.0  # seconds between two progress lines of a step that reports often
DEMO = (RECIPES / "demo.toml").read_text(encoding="utf-8")
# Short prompts of the standard library alone, and short rows: the demo in seconds.
SMALL_DEMO = (
    'data.source={kind="python_docs", packages=[], prompt_chars=60}',
    *("train.steps=1", "train.max_length=64", "evaluate.every=0", "evaluate.rows=1"),
)


class Figure(NamedTuple):
    """One result; its value is None where it cannot be measured on this machine."""

    value: float | None
    unit: str


class Bench:
    """A scenario at work: its size, the folder that it may fill, and the figures that it has measured so far."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder, self.small = folder, small
        self.figures: dict[str, Figure] = {}
        self.began = self.last_line = time.monotonic()

    def say(self, step: str) -> None:
        """Prints the step that begins, and the seconds since the start."""
        self.last_line = time.monotonic()
        say(f"{self.last_line - self.began:6.1f} s  {step}", error=True)

    def say_now_and_then(self, step: str) -> None:
        """Prints one of many small steps, unless the last line is still recent."""
        if time.monotonic() - self.last_line >= EVERY_S:
            self.say(step)

    def add(self, name: str, value: float | None, unit: str) -> None:
        """Adds a figure."""
        self.figures[name] = Figure(value, unit)

    def recipe(self, *changes: str, rows: Path | None = None) -> Recipe:
        """A recipe over the `base` of the folder and the rows in it, or in the folder `rows`; all rows train."""
        rows = rows or self.folder
        text = f"""
            name = "bench"
            seed = 1
            evaluate = {{ every = 0, rows = 1 }}
            checkpoint = {{ keep = 1000 }}
            [data]
            source = {{ kind = "parquet", path = "{rows / "rows.parquet"}" }}
            splits = {{ heldout = 0.0, unseen = 0.0, duplicates = "keep" }}
            cache = "{rows / "stores"}"
            [model]
            base = "{self.folder / "base"}"
            [train]
            """
        return parse_recipe(text, [*changes])

    def run(self, work: Recipe, name: str, read: Callable[[], float] = lambda: 0.0) -> tuple[Run, list[float]]:
        """Runs a recipe in the subfolder `name`; what `read` gave at the end of each round comes with the run."""
        readings: list[float] = []

        def at_each_round(event: Event) -> None:
            if isinstance(event, RoundDone):
                readings.append(read())

        return experiments.run(work, out=self.folder / name, on_event=at_each_round), readings


def scenario(*, ray: bool = True) -> Callable[[Callable[[Bench], None]], Callable[[bool], dict[str, Figure]]]:
    """Makes `measure(bench)` a function of `small` that returns the figures; without `ray` none is started for it."""

    def decorate(measure: Callable[[Bench], None]) -> Callable[[bool], dict[str, Figure]]:
        @functools.wraps(measure)
        def measured(small: bool) -> dict[str, Figure]:
            with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None) if ray else nullcontext():
                bench = Bench(Path(name), small)
                measure(bench)
            return bench.figures

        return measured

    return decorate


def metric(run: Run, name: str, split: str = "engine") -> list[float]:
    """One number a round of what a run has logged about all clients together, round 0 left out."""
    rows = (row for row in run.metrics.to_pylist() if row["round"] > 0 and row["client"] is None)
    return [row["value"] for row in rows if (row["split"], row["name"]) == (split, name)]


def seconds_of(
    work: Callable[[], Any], tries: int = 1, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], Any]:
    """The seconds that each of some calls takes by a clock, and what the last one returned."""
    seconds, result = [], None
    for _ in range(tries):
        began = clock()
        result = work()
        seconds.append(clock() - began)
    return seconds, result


def largest_difference(what: str, left: Any, right: Any, tolerance: float) -> float:
    """How far two vectors are apart; ValueError, and so no figure, where that is more than `tolerance` or no number."""
    apart = float(np.abs(np.asarray(left) - np.asarray(right)).max())
    if not apart <= tolerance:
        raise ValueError(f"{what} are {apart:.2g} apart, more than {tolerance:g}: no figure is worth anything")
    return apart


def power(number: int) -> str:
    """A power of ten as figures name it: 1e6."""
    return f"1e{len(str(number)) - 1}"
