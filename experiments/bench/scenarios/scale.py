"""How a recipe's rounds get faster with more slots: `fedpost bench scale RECIPE`, for any recipe and cluster."""

import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from matplotlib.figure import Figure as Picture

import experiments
from engine.messages.errors import RunError
from engine.messages.events import Event, RoundDone, Started
from experiments.bench.harness import Bench, Figure, metric
from experiments.bench.results import show_results
from experiments.config.recipe import Recipe, load_recipe
from strategies.core.cohort import UniformCohort

ROUNDS = 4


class Scaled(NamedTuple):
    """Tokens per second of whole rounds on `slots` slots, that over `slots` times one slot's, and the balance."""

    slots: int
    tokens_per_s: float
    efficiency: float
    balance: float


def study(
    work: Recipe, slots: list[int], address: str | None = None, *, weak: bool = False, rounds: int = ROUNDS
) -> list[Scaled]:
    """Plays the recipe's first rounds with each number of slots; `weak`: the cohort grows with the slots.

    RunError where slots do not fit, ValueError where another number of them leads to other bits.
    """
    results: list[Scaled] = []
    reference: bytes | None = None
    with TemporaryDirectory(prefix="fedpost-bench-") as name:
        bench = Bench(Path(name), small=False)
        for count in slots:
            cohort = work.cohort
            if weak:
                if not isinstance(cohort, UniformCohort):
                    raise RunError('a cohort grows with the slots where it has a size: set cohort.kind = "uniform"')
                cohort = replace(cohort, size=cohort.size * count)
            short = replace(
                work,
                rounds=rounds,
                cohort=cohort,
                clients=replace(work.clients, slots=count),
                evaluate=replace(work.evaluate, every=0, finetune=0, without_privacy=False),
            )
            bench.say(f"{count} slots" + (", a cohort as many times as large" if weak else ""))
            speed, balance, vector, lanes = _play(short, bench.folder / str(len(results)), count, address)
            work = replace(work, clients=replace(work.clients, lanes=lanes))  # what "auto" came to
            reference = reference or vector
            if not weak and reference != vector:
                raise ValueError(f"{count} slots lead to other bits than {slots[0]}: no figure is worth anything")
            alone = results[0].tokens_per_s / results[0].slots if results else speed / count
            results.append(Scaled(count, speed, speed / count / alone, balance))
    return results


def _play(work: Recipe, folder: Path, slots: int, address: str | None) -> tuple[float, float, bytes, int]:
    """Median tokens per second, median balance, the last state, and lanes; the first round, a warm-up, is left out."""
    speeds: list[float] = []
    lanes: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, Started):
            if event.slots < slots:
                raise RunError(f"{slots} slots were asked for, and {event.slots} fit: name fewer, or a larger cluster")
            lanes.append(event.lanes)
        if isinstance(event, RoundDone):
            speeds.append(event.tokens_per_s)

    run = experiments.run(work, out=folder, address=address, on_event=note)
    balance = metric(run, "balance")
    newest = sorted((run.folder / "checkpoints").iterdir())[-1]
    state = b"".join(file.read_bytes() for file in sorted(newest.glob("*.safetensors")))
    return statistics.median(speeds[1:] or speeds), statistics.median(balance[1:] or balance), state, lanes[0]


def as_figures(results: list[Scaled], prefix: str = "") -> dict[str, Figure]:
    """The study's figures by name."""
    figures: dict[str, Figure] = {}
    for slots, speed, efficiency, balance in results:
        figures[f"{prefix}tokens_per_s_{slots}"] = Figure(speed, "tokens/s")
        figures[f"{prefix}efficiency_{slots}"] = Figure(efficiency, f"of {slots} times a slot alone")
        figures[f"{prefix}balance_{slots}"] = Figure(balance, "mean over longest work of a slot")
    return figures


def scale(recipe: Path, slots: str, address: str | None, weak: bool, as_json: bool) -> None:
    """Studies a recipe file over slots such as "1,2,4"; prints and keeps the figures, with a plot beside them."""
    counts = [int(count) if count.strip().isdecimal() else 0 for count in slots.split(",")]
    if min(counts) < 1:
        raise RunError(f"--slots is {slots!r}: give numbers of slots such as 1,2,4")
    results = study(load_recipe(recipe), counts, address, weak=weak)
    kept = show_results("scale", as_figures(results), as_json)
    draw(results, kept.with_name("plot.png"))


def draw(results: list[Scaled], path: Path) -> None:
    """Plots tokens per second against the ideal line, and efficiency, by slots."""
    picture = Picture(figsize=(9, 3.6), layout="constrained")
    speed, efficiency = picture.subplots(1, 2)
    slots = [result.slots for result in results]
    alone = results[0].tokens_per_s / results[0].slots
    speed.plot(slots, [alone * count for count in slots], "--", color="grey", label="ideal")
    speed.plot(slots, [result.tokens_per_s for result in results], "o-", label="measured")
    speed.set(xlabel="slots", ylabel="tokens per second", ylim=(0, None), xticks=slots)
    speed.legend(frameon=False)
    efficiency.axhline(1.0, ls="--", color="grey")
    efficiency.plot(slots, [result.efficiency for result in results], "o-")
    efficiency.set(xlabel="slots", ylabel="efficiency", ylim=(0, 1.15), xticks=slots)
    picture.savefig(path, dpi=150)
