"""`fedpost bench population`: memory and start-up of the driver by how many clients there are, a cohort of 10,000."""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.null import NullRounds, null_recipe, play
from experiments.bench.results import Figure, Steps, in_fresh_process

ROUNDS = 3


def measure(small: bool) -> dict[str, Figure]:
    """Growth of the driver's resident memory from the smallest to the largest population, and seconds of a start."""
    steps, figures, found = Steps(), dict[str, Figure](), list[NullRounds]()
    populations = (1_000, 10_000) if small else (1_000, 100_000, 1_000_000)
    with TemporaryDirectory(prefix="fedpost-bench-") as name:
        for clients in populations:
            cohort = 1_000 if small else 10_000
            folder = Path(name) / str(clients)
            folder.mkdir()
            steps.say(f"{clients:,} clients")
            # A process of its own, which is the driver: what the store's build took is another's.
            in_fresh_process(_built, folder, clients, min(cohort, clients))
            done: NullRounds = in_fresh_process(_played, folder, clients, min(cohort, clients))
            found.append(done)
            ms = statistics.median(done.seconds[1:]) / min(cohort, clients) * 1e3
            figures[f"start_s_{clients}"] = Figure(done.start_s, "s until the first round")
            figures[f"ms_per_client_{clients}"] = Figure(ms, f"ms, in cohorts of {min(cohort, clients):,}")
            figures[f"driver_rss_mb_{clients}"] = Figure(done.rss_mb, "MB")
    figures["start_s"] = Figure(found[-1].start_s, f"s until the first round of {populations[-1]:,} clients")
    grown = found[-1].rss_mb - found[0].rss_mb
    figures["driver_rss_growth_mb"] = Figure(grown, f"MB from {populations[0]:,} to {populations[-1]:,} clients")
    return figures


def _built(folder: Path, clients: int, cohort: int) -> None:
    from engine.rows import token_columns
    from experiments.api import build_store
    from experiments.config import located

    work = located(null_recipe(folder, clients, cohort, 0))
    token_columns(build_store(work), work)


def _played(folder: Path, clients: int, cohort: int) -> NullRounds:
    return play(null_recipe(folder, clients, cohort, 0), folder / "run", ROUNDS)
