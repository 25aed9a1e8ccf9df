"""`fedpost bench scale` (your recipe, any cluster) and `slots` (small ones, simulated nodes too): rounds by slots."""

import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

import experiments
from engine.config.sections import Clients
from engine.messages.errors import RunError
from engine.messages.events import Event, Started
from experiments.bench.bare import PROCESSES, compare
from experiments.bench.harness import Bench, Figure, metric, write_rows
from experiments.bench.results import show_results
from experiments.bench.scenarios.bare_loop import lora_recipe, write_lora_inputs
from experiments.config.recipe import Recipe, load_recipe
from experiments.preflight.processes import environment, hidden_gpus
from experiments.report.charts import Series, lines
from experiments.runs.api import ray_session
from strategies.core.cohort import UniformCohort
from strategies.core.seeds import rng

ROUNDS = 4  # of `scale`
PER_SLOT = 5  # clients of a cohort that grows with the slots
NODES, GPUS, SHARE = 3, 2, 0.5  # logical GPUs: Ray places by them, and the slots compute on the CPU
BALANCE = "mean over longest work of a slot"


class Scaled(NamedTuple):
    """Tokens per second of whole rounds on `slots` slots, that over `slots` times one slot's, and the balance."""

    slots: int
    tokens_per_s: float
    efficiency: float
    balance: float


def study(
    work: Recipe, slots: list[int], address: str | None = None, *, weak: bool = False, rounds: int = ROUNDS
) -> list[Scaled]:
    """Plays a recipe by slots (`weak`: clients grow with them); RunError without room, ValueError for other bits."""
    results, reference, clients = list[Scaled](), b"", work.clients
    work = replace(work, evaluate=replace(work.evaluate, every=0, finetune=0, without_privacy=False))
    with TemporaryDirectory(prefix="fedpost-bench-") as name:
        bench = Bench(Path(name), small=False)
        for count in slots:
            cohort = work.cohort
            if weak:
                if not isinstance(cohort, UniformCohort):
                    raise RunError('a cohort grows with the slots where it has a size: set cohort.kind = "uniform"')
                cohort = replace(cohort, size=cohort.size * count)
            short = replace(work, rounds=rounds, cohort=cohort, clients=replace(clients, slots=count))
            bench.say(f"{count} slots" + (", a cohort as many times as large" if weak else ""))
            # The number of lanes that "auto" comes to is that of all later runs.
            speed, balance, vector, clients = _play(short, bench.folder / str(len(results)), count, address)
            reference = reference or vector
            if not weak and reference != vector:
                raise ValueError(f"{count} slots lead to other bits than {slots[0]}: no figure is worth anything")
            alone = results[0].tokens_per_s / results[0].slots if results else speed / count
            results.append(Scaled(count, speed, speed / count / alone, balance))
    return results


def _play(work: Recipe, folder: Path, slots: int, address: str | None) -> tuple[float, float, bytes, Clients]:
    """Median tokens per second and balance without the first round, a warm-up; the last state; the resolved section."""

    def refuse_fewer(event: Event) -> None:
        if isinstance(event, Started) and event.slots < slots:
            raise RunError(f"{slots} slots were asked for, and {event.slots} fit: name fewer, or a larger cluster")

    run = experiments.run(work, out=folder, address=address, on_event=refuse_fewer)
    each = (metric(run, name) for name in ("tokens_per_s", "balance"))
    speed, balance = (statistics.median(values[1:] or values) for values in each)
    newest = max((run.folder / "checkpoints").iterdir())
    state = b"".join(file.read_bytes() for file in sorted(newest.glob("*.safetensors")))
    return speed, balance, state, load_recipe(run.folder / "recipe.toml").clients


def as_figures(results: list[Scaled], prefix: str = "") -> dict[str, Figure]:
    """The study's figures by name."""
    units = {"tokens_per_s": "tokens/s", "efficiency": "of as many times a slot alone", "balance": BALANCE}
    both = product(results, units.items())
    return {f"{prefix}{name}_{each.slots}": Figure(getattr(each, name), unit) for each, (name, unit) in both}


def scale(recipe: Path, slots: str, address: str | None, weak: bool, as_json: bool) -> None:
    """Studies a recipe file over slots such as "1,2,4"; prints and keeps the figures, with charts on their page."""
    counts = [int(count) if count.strip().isdecimal() else 0 for count in slots.split(",")]
    if min(counts) < 1:
        raise RunError(f"--slots is {slots!r}: give numbers of slots such as 1,2,4")
    results = study(load_recipe(recipe), counts, address, weak=weak)
    show_results("scale", as_figures(results), as_json, draw(results))


def draw(results: list[Scaled]) -> list[Markup]:
    """Charts of tokens per second and of efficiency by slots, beside the ideal."""
    alone, charts = results[0].tokens_per_s / results[0].slots, []
    for title, name, ideal in (("Tokens per second", "tokens_per_s", alone), ("Efficiency", "efficiency", None)):
        line = [(each.slots, ideal * each.slots if ideal else 1.0) for each in results]
        measured = Series("measured", [(each.slots, getattr(each, name)) for each in results], 1)
        charts.append(lines(title, [Series("ideal", line, 3, "6 3"), measured], "slots", "", zero=True))
    return charts


def slots(bench: Bench) -> None:
    """Measures tokens per second and efficiency with one and two slots; ValueError if bits or loops differ."""
    rounds = 3 if bench.small else 8
    write_lora_inputs(bench)
    work = lora_recipe(bench, 2, *((1, 32) if bench.small else (4, 128)))
    with ray_session(None):
        bench.add("apart", compare(work, bench.folder / "gate").apart, "largest difference to the bare loop")
        bench.figures |= as_figures(study(work, [1, 2], rounds=rounds), "strong_")
        if not bench.small:
            bench.figures |= as_figures(study(work, [1, 2], weak=True, rounds=rounds), "weak_")
        _measure_uneven(bench, rounds)
    bench.say(f"a simulated cluster of {NODES} nodes with {GPUS} logical GPUs each")
    _measure_cluster(bench, work, rounds)


def _measure_uneven(bench: Bench, rounds: int) -> None:
    """Measures how evenly two slots work on clients with lognormal numbers of rows, all of which are trained on."""
    counts = np.ceil(rng(0, 0, -1, "sample").lognormal(1.5, 1.0, 200)).astype(int)
    write_rows(rows := bench.folder / "uneven", len(counts), counts, 64)
    size = f"rounds={rounds}", f"clients.slots={PROCESSES}", "cohort.size=40"
    work = bench.recipe(*size, "train={epochs=1, batch=2, max_length=64}", rows=rows)
    balance = metric(bench.run(work, "uneven/run")[0], "balance")
    bench.add("balance_lognormal", statistics.median(balance), BALANCE)
    bench.add("balance_lognormal_worst", min(balance), BALANCE)


def _measure_cluster(bench: Bench, work: Recipe, rounds: int) -> None:
    """Compares slots on Ray nodes, which share the cores, with the gate's run bit for bit; measures what they cost."""
    from ray.cluster_utils import Cluster

    share = 1.0 if bench.small else SHARE
    slots = round(NODES * GPUS / share)
    with environment(**hidden_gpus(GPUS)):
        cluster = Cluster(True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=1, num_gpus=GPUS)
            wide = replace(work, clients=replace(work.clients, slots=slots, num_cpus=0.0, num_gpus=share))
            run = experiments.run(wide, out=bench.folder / "nodes", address=cluster.address)
            for weak in () if bench.small else (True, False):
                scaled = replace(wide, cohort=UniformCohort(size=PER_SLOT)) if weak else wide
                results = study(scaled, [NODES, 2 * NODES], cluster.address, weak=weak, rounds=rounds)
                bench.figures |= as_figures(results, "cluster_weak_" if weak else "cluster_strong_")
        finally:
            cluster.shutdown()
    for file in run.model.glob("adapter_model*"):
        if file.read_bytes() != (bench.folder / "gate" / "model" / file.name).read_bytes():
            raise ValueError("slots on several nodes lead to other bits than on one")
    bench.add("cluster_slots", slots, f"slots on {NODES} simulated nodes, the same bits as on one")
    bench.add("cluster_round_s", metric(run, "round_s")[-1], "s, all on this machine's cores")
