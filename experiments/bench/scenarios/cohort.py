"""`fedpost bench cohort`: the time of a round by the size of its cohort, against the bare loop on the same clients."""

from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.bare import compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.results import Figure, Steps
from experiments.bench.scenarios import tiny
from experiments.runs.api import ray_session


def measure(small: bool) -> dict[str, Figure]:
    """Milliseconds a client and the ratio to the bare loop by cohort; ValueError when they differ."""
    steps, figures = Steps(), dict[str, Figure]()
    cohorts = (100,) if small else (10, 100, 1_000, 10_000)
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        write_llama(folder / "base", tiny.LLAMA, of_bytes=True)
        write_rows(folder / "rows.parquet", cohorts[-1], tiny.ROWS, tiny.WORDS)
        for cohort in cohorts:
            rounds = 3 if small or cohort > 1_000 else 8
            steps.say(f"{rounds} rounds of {cohort:,} clients")
            found = compare(tiny.recipe(folder, folder / "base", cohort, rounds, 1), folder / f"run-{cohort}")
            figures[f"ms_per_client_{cohort}"] = Figure(min(found.engine_s[1:]) / cohort * 1e3, "ms, the best round")
            figures[f"clients_ratio_{cohort}"] = Figure(found.ratio, "of the bare loop's clients/s")
    return figures
