"""`fedpost bench population`: memory and start-up of the driver by how many clients there are, in one cohort's size."""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.null import NullRounds, null_recipe, play
from experiments.bench.results import Figure, Steps
from experiments.bench.scenarios.partition import power
from experiments.preflight.processes import in_fresh_process

ROUNDS = 3
COHORT, LARGE_COHORT = 1_000, 10_000


def measure(small: bool) -> dict[str, Figure]:
    """Growth of the driver's resident memory from the smallest to the largest population, and seconds of a start.

    The cohort is the same in all of them; a large one is played by itself, from the largest population.
    """
    steps, figures, found = Steps(), dict[str, Figure](), list[NullRounds]()
    populations = (1_000, 10_000) if small else (1_000, 10_000, 100_000, 1_000_000)
    largest = populations[-1]
    with TemporaryDirectory(prefix="fedpost-bench-") as name:
        folders = {clients: Path(name) / power(clients) for clients in populations}
        for clients, folder in folders.items():
            folder.mkdir()
            steps.say(f"rows of {clients:,} clients")
            in_fresh_process(_built, folder, clients)
        for clients, folder in folders.items():  # all stores are there, so that all starts find the same machine
            steps.say(f"a cohort of {COHORT:,} of {clients:,} clients")
            # A process of its own, which is the driver: what the store's build took is another's.
            done = in_fresh_process(_played, folder, clients, COHORT)
            found.append(done)
            figures[f"start_s_{power(clients)}"] = Figure(done.start_s, "s until the first round")
            figures[f"ms_per_client_{power(clients)}"] = _ms(done, COHORT)
            figures[f"driver_rss_mb_{power(clients)}"] = Figure(done.rss_mb, "MB")
        if not small:
            steps.say(f"a cohort of {LARGE_COHORT:,} of {largest:,} clients")
            done = in_fresh_process(_played, folders[largest], largest, LARGE_COHORT)
            figures[f"ms_per_client_cohort_{power(LARGE_COHORT)}"] = _ms(done, LARGE_COHORT)
    figures["start_s"] = Figure(found[-1].start_s, f"s until the first round of {largest:,} clients")
    grown = found[-1].rss_mb - found[0].rss_mb
    figures["driver_rss_growth_mb"] = Figure(grown, f"MB from {populations[0]:,} to {largest:,} clients")
    return figures


def _ms(done: NullRounds, cohort: int) -> Figure:
    return Figure(statistics.median(done.seconds[1:]) / cohort * 1e3, f"ms, in cohorts of {cohort:,}")


def _built(folder: Path, clients: int) -> None:
    from engine.workers.token_columns import token_columns
    from experiments.config.recipe import located
    from experiments.runs.api import build_store

    work = located(null_recipe(folder, clients, COHORT, 0))
    token_columns(build_store(work), work)


def _played(folder: Path, clients: int, cohort: int) -> NullRounds:
    return play(null_recipe(folder, clients, cohort, 0), folder / f"run-{cohort}", ROUNDS)
