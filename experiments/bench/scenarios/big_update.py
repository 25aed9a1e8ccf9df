"""`fedpost bench big_update`: an update of 25 million parameters and hardly any training, against the bare loop."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import bench_recipe, write_llama, write_rows
from experiments.bench.results import Figure
from experiments.bench.tree import held_by_command
from experiments.runs.api import ray_session

LLAMA = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = 195_000  # twice times 64: 25 million parameters whose training is one short row
CLIENTS, COHORT, LENGTH = 40, 20, 8


def measure(small: bool) -> dict[str, Figure]:
    """Time and memory over the bare loop's; ValueError when they differ."""
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        write_llama(folder / "base", LLAMA, vocabulary=VOCABULARY // 10 if small else VOCABULARY)
        write_rows(folder / "rows.parquet", CLIENTS, 1, LENGTH)
        work = bench_recipe(
            folder,
            folder / "base",
            f"""
            rounds = {3 if small else 8}
            clients = {{ slots = {PROCESSES} }}
            cohort = {{ size = {COHORT} }}
            [train]
            steps = 1
            batch = 1
            max_length = {LENGTH}
            optimizer = {{ kind = "sgd", lr = 0.1 }}
            [model]
            peft = {{ kind = "none" }}
            """,
        )
        found = compare(work, folder / "run")
        held = held_by_command(replace(work, rounds=3), folder / "held")
        return {
            "time_ratio": Figure(1 / found.ratio, "times the bare loop's time"),
            "tree_rss_mb": Figure(held.rss, "MB, all processes but Ray's daemons"),
            "tree_pss_mb": Figure(held.pss, "MB, shared pages counted once"),
            "apart": Figure(found.apart, "largest difference"),
        }
