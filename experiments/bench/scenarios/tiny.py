"""`fedpost bench tiny`: clients per second, where a client is a step of 8 rows of a model of ten thousand parameters.

What is left of the time is the engine's own. The bare loop does the same training and averaging in the same run.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import bench_recipe, write_llama, write_rows
from experiments.bench.results import Figure, Steps
from experiments.config.recipe import Recipe
from experiments.runs.api import ray_session

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS, WORDS, LENGTH = 8, 8, 16
SIZES = {"1e3": (1_000, 100, 20), "1e5": (100_000, 1_000, 6)}  # clients, cohort, rounds
LANES = 25  # a cohort of 100 is two whole packs for each slot


def recipe(folder: Path, base: Path, cohort: int, rounds: int, lanes: int) -> Recipe:
    """One step of all rows of a client; full tuning, or in packs LoRA, which alone packs."""
    peft = "none" if lanes == 1 else "lora"
    return bench_recipe(
        folder,
        base,
        f"""
        rounds = {rounds}
        clients = {{ slots = {PROCESSES}, lanes = {lanes} }}
        cohort = {{ size = {cohort} }}
        [train]
        steps = 1
        batch = {ROWS}
        max_length = {LENGTH}
        optimizer = {{ kind = "sgd", lr = 0.1 }}
        [model]
        peft = {{ kind = "{peft}" }}
        """,
    )


def measure(small: bool) -> dict[str, Figure]:
    """Ratios of clients per second, unpacked at both sizes and packed at the smaller; ValueError when they differ."""
    steps, figures = Steps(), dict[str, Figure]()
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        write_llama(folder / "base", LLAMA, of_bytes=True)
        for size, (clients, cohort, rounds) in SIZES.items():
            own = folder / size
            own.mkdir()
            if small and size == "1e5":
                clients, cohort, rounds = 2_000, 200, 3
            steps.say(f"rows of {clients:,} clients")
            write_rows(own / "rows.parquet", clients, ROWS, WORDS)
            for key, lanes in ((f"clients_ratio_{size}", 1), ("packed_ratio", LANES)):
                if lanes == 1 or size == "1e3":
                    steps.say(f"{rounds} rounds of {cohort:,} of them, {lanes} at once")
                    work = recipe(own, folder / "base", cohort, 2 if small else rounds, lanes)
                    found = compare(work, own / key)
                    figures[key] = Figure(found.ratio, "of the bare loop's clients/s")
                    figures[f"apart_{key}"] = Figure(found.apart, "largest difference")
                    figures[f"ms_per_client_{key}"] = Figure(min(found.engine_s[1:]) / cohort * 1e3, "ms, best round")
    return figures
