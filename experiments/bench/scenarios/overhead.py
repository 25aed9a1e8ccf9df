"""`fedpost bench overhead`: what the engine costs for each client that does nothing, by the size of its update."""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.null import null_recipe, play
from experiments.bench.results import Figure, Steps

SLOTS, ROUNDS = 2, 5
COHORTS = {0: (100, 1_000, 10_000), 4: (100, 1_000, 10_000), 35: (100, 1_000)}  # MB of an update
SMALL = {0: (1_000,), 4: (100,), 35: (20,)}


def measure(small: bool) -> dict[str, Figure]:
    """Milliseconds a client, amortised over the largest cohort, and bytes in the object store over P (4 + 8 slots)."""
    steps, figures, over = Steps(), dict[str, Figure](), list[float]()
    cohorts = SMALL if small else COHORTS
    with TemporaryDirectory(prefix="fedpost-bench-") as name:
        folder = Path(name)
        for size_mb, some in cohorts.items():
            for cohort in some:
                steps.say(f"cohorts of {cohort:,} with updates of {size_mb} MB")
                work = null_recipe(folder, max(map(max, cohorts.values())), cohort, size_mb, SLOTS)
                rounds = 2 if small or size_mb * cohort > 10_000 else ROUNDS
                done = play(work, folder / f"run-{size_mb}-{cohort}", rounds)
                ms = statistics.median(done.seconds[1:]) / cohort * 1e3
                figures[f"ms_per_client_{size_mb}mb_{cohort}"] = Figure(ms, f"ms, {done.parameters * 4:,} bytes each")
                figures[f"ms_per_client_{size_mb}mb"] = Figure(ms, f"ms, in cohorts of {cohort:,}")
                if size_mb:  # smaller ones are sent inside Ray's messages
                    over.append(done.nbytes / (done.parameters * (4 + 8 * SLOTS)))
    figures["bytes_over_bound"] = Figure(max(over), "of P (4 + 8 slots), by Ray's own count, the worst case")
    return figures
