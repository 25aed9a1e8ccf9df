"""`fedpost bench memory`: what n slots hold on one node, which share one base."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

import experiments
from engine.messages.events import Event, RoundDone
from experiments.bench.bare import compare
from experiments.bench.bases import bench_recipe, write_llama, write_rows
from experiments.bench.results import Figure, Steps
from experiments.config.recipe import Recipe
from experiments.runs.api import ray_session

LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
VOCABULARY = 27_000  # with it 126 million parameters, 482 MB


def measure(small: bool) -> dict[str, Figure]:
    """PSS of all slots by their number, and what another slot adds; ValueError when the bare loop's vector differs."""
    steps, figures, held = Steps(), dict[str, Figure](), dict[int, float]()
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        sizes = LLAMA | {"num_hidden_layers": 2 if small else 12}
        write_llama(folder / "base", sizes, vocabulary=None if small else VOCABULARY)
        write_rows(folder / "rows.parquet", 8, 2, 16)
        work = bench_recipe(
            folder,
            folder / "base",
            """
            rounds = 2
            clients = { slots = 1, num_cpus = 0.25 }
            cohort = { size = 8 }
            train = { steps = 1, batch = 1, max_length = 16, optimizer = { kind = "sgd", lr = 0.1 } }
            """,
        )
        steps.say("the gate: one slot and a bare loop")
        figures["apart"] = Figure(compare(work, folder / "gate").apart, "largest difference to the bare loop")
        for slots in (1, 2) if small else (1, 2, 4):
            steps.say(f"{slots} slots")
            clients = replace(work.clients, slots=slots)
            held[slots] = _held(replace(work, clients=clients), folder / f"run-{slots}")
            figures[f"slots_pss_mb_{slots}"] = Figure(held[slots], "MB, all slots, shared pages counted once")
    slope = float(np.polyfit(list(held), list(held.values()), 1)[0])
    figures["mb_per_slot"] = Figure(slope, "MB that one more slot adds")
    return figures


def _held(work: Recipe, folder: Path) -> float:
    """The most that all slots held together at the end of a round, in MB of PSS."""
    seen: list[float] = []

    def look(event: Event) -> None:
        if isinstance(event, RoundDone):
            total = 0.0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "ray::ClientActor" in " ".join(process.cmdline()[:2]):
                        total += process.memory_full_info().pss / 2**20
            seen.append(total)

    experiments.run(work, out=folder, on_event=look)
    return max(seen)
