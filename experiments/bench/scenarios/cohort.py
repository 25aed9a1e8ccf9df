"""`fedpost bench cohort`: the time of a round by the size of its cohort, against the bare loop on the same clients."""

from experiments.bench.bare import compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench, scenario
from experiments.bench.scenarios import tiny


@scenario()
def measure(bench: Bench) -> None:
    """Measures milliseconds a client and the ratio to the bare loop by cohort; ValueError when the two disagree."""
    cohorts = (100,) if bench.small else (10, 100, 1_000, 10_000)
    write_llama(bench.folder / "base", tiny.LLAMA, of_bytes=True)
    write_rows(bench.folder, cohorts[-1], tiny.ROWS, tiny.WORDS)
    for cohort in cohorts:
        rounds = 3 if bench.small or cohort > 1_000 else 8
        bench.say(f"{rounds} rounds of {cohort:,} clients")
        compared = compare(tiny.recipe(bench, cohort, rounds, lanes=1), bench.folder / f"run-{cohort}")
        bench.add(f"ms_per_client_{cohort}", compared.best_round_s / cohort * 1e3, "ms, the best round")
        bench.add(f"clients_ratio_{cohort}", compared.ratio, "of the bare loop's clients/s")
