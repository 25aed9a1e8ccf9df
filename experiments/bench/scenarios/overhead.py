"""`fedpost bench overhead`: what the engine costs for each client that does nothing, by the size of its update."""

import statistics

from experiments.bench.harness import Bench, scenario
from experiments.bench.null import null_recipe, play

SLOTS, ROUNDS = 2, 5
COHORTS = {0: (100, 1_000, 10_000), 4: (100, 1_000, 10_000), 35: (100, 1_000)}  # by MB of an update
SMALL = {0: (1_000,), 4: (100,), 35: (20,)}


@scenario()
def measure(bench: Bench) -> None:
    """Measures milliseconds a client in the largest cohort, and bytes in the object store over P (4 + 8 slots)."""
    cohorts, ratios = SMALL if bench.small else COHORTS, []
    for size_mb, sizes in cohorts.items():
        for cohort in sizes:
            bench.say(f"cohorts of {cohort:,} with updates of {size_mb} MB")
            work = null_recipe(bench, max(map(max, cohorts.values())), cohort, size_mb, SLOTS)
            rounds = 2 if bench.small or size_mb * cohort > 10_000 else ROUNDS
            played = play(work, bench.folder / f"run-{size_mb}-{cohort}", rounds)
            ms = statistics.median(played.seconds[1:]) / cohort * 1e3
            bench.add(f"ms_per_client_{size_mb}mb_{cohort}", ms, f"ms, {played.parameters * 4:,} bytes each")
            bench.add(f"ms_per_client_{size_mb}mb", ms, f"ms, in cohorts of {cohort:,}")
            if size_mb:  # smaller updates are sent inside Ray's messages
                ratios.append(played.nbytes / (played.parameters * (4 + 8 * SLOTS)))
    bench.add("bytes_over_bound", max(ratios), "of P (4 + 8 slots), by Ray's own count, the worst case")
