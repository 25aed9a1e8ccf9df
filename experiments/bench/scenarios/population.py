"""`fedpost bench population`: memory and start-up of the driver by the number of clients, with cohorts of one size."""

import statistics

from engine.workers.token_columns import token_columns
from experiments.bench.harness import Bench, power, scenario
from experiments.bench.null import NullRounds, null_recipe, play
from experiments.config.recipe import located
from experiments.preflight.processes import in_fresh_process
from experiments.runs.api import build_store

ROUNDS = 3
COHORT, LARGE_COHORT = 1_000, 10_000


@scenario(ray=False)
def measure(bench: Bench) -> None:
    """Measures the driver's growth from the smallest to the largest population, and seconds of a start.

    The cohort is the same in all of them; a large one is played by itself, from the largest population.
    """
    populations = (1_000, 10_000) if bench.small else (1_000, 10_000, 100_000, 1_000_000)
    parts = {clients: Bench(bench.folder / power(clients), bench.small) for clients in populations}
    for clients, part in parts.items():
        part.folder.mkdir()
        bench.say(f"rows of {clients:,} clients")
        in_fresh_process(_write_store, part, clients)
    starts: list[NullRounds] = []
    for clients, part in parts.items():  # after all stores are built, so that all starts find the same machine
        size = power(clients)
        bench.say(f"a cohort of {COHORT:,} of {clients:,} clients")
        # The fresh process is the driver: the memory of building the store is not in it.
        starts.append(played := in_fresh_process(_play, part, clients, COHORT))
        bench.add(f"start_s_{size}", played.start_s, "s until the first round")
        _add_ms(bench, size, played, COHORT)
        bench.add(f"driver_rss_mb_{size}", played.rss_mb, "MB")
    fewest, most = populations[0], populations[-1]
    if not bench.small:
        bench.say(f"a cohort of {LARGE_COHORT:,} of {most:,} clients")
        played = in_fresh_process(_play, parts[most], most, LARGE_COHORT)
        _add_ms(bench, f"cohort_{power(LARGE_COHORT)}", played, LARGE_COHORT)
    bench.add("start_s", starts[-1].start_s, f"s until the first round of {most:,} clients")
    growth = starts[-1].rss_mb - starts[0].rss_mb
    bench.add("driver_rss_growth_mb", growth, f"MB from {fewest:,} to {most:,} clients")


def _add_ms(bench: Bench, name: str, played: NullRounds, cohort: int) -> None:
    ms = statistics.median(played.seconds[1:]) / cohort * 1e3
    bench.add(f"ms_per_client_{name}", ms, f"ms, in cohorts of {cohort:,}")


def _write_store(bench: Bench, clients: int) -> None:
    work = located(null_recipe(bench, clients, COHORT, 0))
    token_columns(build_store(work), work)


def _play(bench: Bench, clients: int, cohort: int) -> NullRounds:
    return play(null_recipe(bench, clients, cohort, 0), bench.folder / f"run-{cohort}", ROUNDS)
