"""How a recipe's rounds get faster with more slots: `fedpost bench scale RECIPE`, for anybody's recipe and cluster."""

import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import experiments
from engine.messages.events import Event, RoundDone, Started
from experiments.bench.results import Figure, Steps, show_results
from experiments.config.recipe import Recipe, load_recipe
from strategies.core.cohort import UniformCohort

ROUNDS = 4


class Scaled(NamedTuple):
    """Tokens per second of whole rounds with so many slots, that over one slot's times their number; the balance."""

    slots: int
    tokens_per_s: float
    efficiency: float
    balance: float


def study(
    work: Recipe, slots: list[int], address: str | None = None, *, weak: bool = False, rounds: int = ROUNDS
) -> list[Scaled]:
    """The recipe's first rounds with each number of slots; `weak`: the cohort grows with the slots.

    ValueError where slots do not fit, or where another number of them leads to other bits.
    """
    steps, found, reference = Steps(), list[Scaled](), dict[int, bytes]()
    for count in slots:
        cohort = work.cohort
        if weak:
            if not isinstance(cohort, UniformCohort):
                raise ValueError('a cohort that grows with the slots is one of a size: cohort.kind = "uniform"')
            cohort = replace(cohort, size=cohort.size * count)
        short = replace(
            work,
            rounds=rounds,
            cohort=cohort,
            clients=replace(work.clients, slots=count),
            evaluate=replace(work.evaluate, every=0, finetune=0, without_privacy=False),
        )
        steps.say(f"{count} slots" + (", a cohort as many times as large" if weak else ""))
        speed, balance, vector, lanes = _rounds(short, count, address)
        work = replace(work, clients=replace(work.clients, lanes=lanes))  # what "auto" came to
        if not weak and reference.setdefault(0, vector) != vector:
            raise ValueError(f"{count} slots lead to other bits than {slots[0]}: no figure is worth anything")
        base = found[0].tokens_per_s / found[0].slots if found else speed / count
        found.append(Scaled(count, speed, speed / count / base, balance))
    return found


def _rounds(work: Recipe, slots: int, address: str | None) -> tuple[float, float, bytes, int]:
    """Median tokens per second, median balance, the last state, and lanes; the first round is left out: it warms up."""
    speeds: list[float] = []
    lanes: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, Started) and event.slots < slots:
            raise ValueError(f"{slots} slots were asked for, and {event.slots} fit: name fewer, or a larger cluster")
        if isinstance(event, Started):
            lanes.append(event.lanes)
        if isinstance(event, RoundDone):
            speeds.append(event.tokens_per_s)

    with TemporaryDirectory(prefix="fedpost-bench-") as name:
        run = experiments.run(work, out=Path(name) / "run", address=address, on_event=look)
        balance = [row["value"] for row in run.metrics.to_pylist() if row["name"] == "balance"]
        newest = sorted((run.folder / "checkpoints").iterdir())[-1]
        state = b"".join(file.read_bytes() for file in sorted(newest.glob("*.safetensors")))
    return statistics.median(speeds[1:] or speeds), statistics.median(balance[1:] or balance), state, lanes[0]


def as_figures(found: list[Scaled], prefix: str = "") -> dict[str, Figure]:
    """The study's figures by name."""
    figures: dict[str, Figure] = {}
    for one in found:
        figures[f"{prefix}tokens_per_s_{one.slots}"] = Figure(one.tokens_per_s, "tokens/s")
        figures[f"{prefix}efficiency_{one.slots}"] = Figure(one.efficiency, f"of {one.slots} times a slot alone")
        figures[f"{prefix}balance_{one.slots}"] = Figure(one.balance, "mean over longest work of a slot")
    return figures


def scale(recipe: Path, slots: str, address: str | None, weak: bool, as_json: bool) -> None:
    """The study of a recipe file over slots such as "1,2,4": printed and kept, with a plot beside; ValueError."""
    try:
        counts = [int(count) for count in slots.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--slots is {slots!r}: give numbers of slots such as 1,2,4")
    found = study(load_recipe(recipe), counts, address, weak=weak)
    kept = show_results("scale", as_figures(found), as_json)
    draw(found, kept.with_name("plot.png"))


def draw(found: list[Scaled], path: Path) -> None:
    """Tokens per second against the ideal line, and efficiency, by slots."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (speed, efficiency) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    slots = [one.slots for one in found]
    alone = found[0].tokens_per_s / found[0].slots
    speed.plot(slots, [alone * count for count in slots], "--", color="grey", label="ideal")
    speed.plot(slots, [one.tokens_per_s for one in found], "o-", label="measured")
    speed.set(xlabel="slots", ylabel="tokens per second", ylim=(0, None), xticks=slots)
    speed.legend(frameon=False)
    efficiency.axhline(1.0, ls="--", color="grey")
    efficiency.plot(slots, [one.efficiency for one in found], "o-")
    efficiency.set(xlabel="slots", ylabel="efficiency", ylim=(0, 1.15), xticks=slots)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
