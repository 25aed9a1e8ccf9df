"""`fedpost bench plan`: what `fedpost plan` says that slots and ranks take, over the most that they held in a run.

The gate is the number of parameters, which both must count alike.
"""

import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

import experiments
from engine.config.sections import Zero
from engine.messages.events import Event, Started
from experiments.bench.bases import bench_recipe, write_llama, write_rows
from experiments.bench.results import Figure, Steps
from experiments.bench.scenarios.zero import LARGE, RANKS
from experiments.config.recipe import Recipe, load_recipe, located
from experiments.preflight.plan import Need, process_bytes, rank_need, sizes, slot_need
from experiments.runs.api import ray_session

MIB = 2**20
EVERY_S = 0.05
DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo.toml"
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def measure(small: bool) -> dict[str, Figure]:
    """Estimate over peak for the demo's slots and for two ranks of stage 3; ValueError when parameters differ."""
    steps = Steps()
    plain, gang = process_bytes()
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        demo = load_recipe(DEMO)
        demo = replace(demo, rounds=1 if small else 2, evaluate=replace(demo.evaluate, every=0))
        if small:
            demo = replace(demo, train=replace(demo.train, steps=1, epochs=None))
        steps.say("the demo's slots")
        found = sizes(located(demo).model, demo.train.max_length)
        figures = _held(demo, folder / "demo", "ClientActor", slot_need(found, demo, plain), "demo")
        steps.say("two ranks of stage 3, all weights trained")
        write_llama(folder / "base", SMALL if small else LARGE, vocabulary=None if small else 8192)
        write_rows(folder / "rows.parquet", 4, 8, 3 * 64)
        zero = Zero(stage=3, ranks=RANKS)
        work = bench_recipe(
            folder,
            folder / "base",
            """
            rounds = 2
            cohort = { size = 2 }
            train = { steps = 2, batch = 4, max_length = 64 }
            [clients]
            slots = 1
            [clients.zero]
            stage = 3
            ranks = 2
            [model]
            peft = { kind = "none" }
            """,
        )
        found = sizes(work.model, work.train.max_length)
        need = rank_need(found, work, zero, gang)
        return figures | _held(work, folder / "gang", "Rank", need, "stage_3")


def _held(work: Recipe, folder: Path, title: str, need: Need, name: str) -> dict[str, Figure]:
    counted: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, Started):
            counted.append(event.parameters)

    peaks, over = [0.0], threading.Event()
    watch = threading.Thread(target=_watch, args=(title, peaks, over))
    watch.start()
    try:
        experiments.run(work, out=folder, on_event=look)
    finally:
        over.set()
        watch.join()
    trained = sizes(located(work).model, 8).trained
    if counted != [trained]:
        raise ValueError(f"the run counts {counted} trained parameters, and the plan {trained}")
    if not max(peaks):
        return {f"{name}_plan_over_peak": Figure(None, "not on this system")}
    return {
        f"{name}_plan_over_peak": Figure(need.total / MIB / max(peaks), "estimate / most that was held"),
        f"{name}_peak_mb": Figure(max(peaks), "MB, the largest process"),
        f"{name}_plan_mb": Figure(need.total / MIB, "MB"),
    }


def _watch(title: str, peaks: list[float], over: threading.Event) -> None:
    """Notes until `over` how many MB each process of this title holds: its own and its files, no object store."""
    while not over.wait(EVERY_S):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, OSError):
                if f"ray::{title}" in " ".join(process.cmdline()[:2]):
                    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    own = [line.split()[1] for line in status if line.startswith(("RssAnon:", "RssFile:"))]
                    peaks.append(sum(map(int, own)) / 1024)
