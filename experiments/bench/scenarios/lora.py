"""`fedpost bench lora`: whole rounds of LoRA clients against a bare PyTorch loop in the same run, packed and not.

No figure is printed unless both have the same vector after the first round.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import bench_recipe, write_llama, write_rows
from experiments.bench.results import Figure, Steps
from experiments.bench.tree import held_by_command
from experiments.config.recipe import Recipe
from experiments.runs.api import ray_session

CLIENTS, COHORT, ROWS, STEPS = 40, 10, 24, 4
LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
# Rows of a step, tokens of a row, lanes, and a cohort of which each slot gets as many whole packs.
# The first is the recipe that peers were measured on.
CASES = (
    (4, 128, 1, COHORT),
    (1, 32, 8, 32),
    (2, 32, 8, 32),
    (4, 32, 8, 32),
    (1, 128, 8, 16),
    (2, 128, 8, 16),
    (4, 128, 8, 16),
    (1, 32, 1, COHORT),
    (2, 32, 1, COHORT),
    (4, 32, 1, COHORT),
    (1, 128, 1, COHORT),
    (2, 128, 1, COHORT),
)


def recipe(
    folder: Path, rounds: int, batch: int = 4, length: int = 128, lanes: int = 1, cohort: int = COHORT
) -> Recipe:
    """LoRA on a small random Llama, 4 steps a client, of 40 clients; base and rows are in `folder`, or written."""
    if not (folder / "base").exists():
        write_llama(folder / "base", LLAMA)
        write_rows(folder / "rows.parquet", CLIENTS, ROWS, 3 * 128)
    return bench_recipe(
        folder,
        folder / "base",
        f"""
        rounds = {rounds}
        clients = {{ slots = {PROCESSES}, lanes = {lanes} }}
        cohort = {{ size = {cohort} }}
        [train]
        steps = {STEPS}
        batch = {batch}
        max_length = {length}
        optimizer = {{ kind = "adamw", eps = 1e-6 }}
        """,
    )


def measure(small: bool) -> dict[str, Figure]:
    """Tokens per second over the bare loop's by case, and the memory of all processes; ValueError when they differ."""
    steps, figures = Steps(), dict[str, Figure]()
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        for batch, length, lanes, cohort in CASES[:2] if small else CASES:
            case = f"{batch}x{length}" + (f"_packed_{lanes}" if lanes > 1 else "")
            steps.say(f"{batch} rows of {length} tokens a step, {lanes} of {cohort} clients at once")
            work = recipe(folder, 2 if small else 8 if figures else 15, batch, length, lanes, cohort)
            found = compare(work, folder / f"run-{case}")
            figures[f"efficiency_{case}"] = Figure(found.ratio, "of the bare loop's tokens/s")
            figures[f"apart_{case}"] = Figure(found.apart, "largest difference")
            if case == "4x128":
                figures = {"efficiency": figures[f"efficiency_{case}"], "apart": figures[f"apart_{case}"]}
                figures["tokens_per_s"] = Figure(found.tokens / min(found.engine_s[1:]), "tokens/s, the best round")
                held = held_by_command(replace(work, rounds=min(3, work.rounds)), folder / "held")
                figures["tree_rss_mb"] = Figure(held.rss, "MB, all processes but Ray's daemons")
                figures["tree_pss_mb"] = Figure(held.pss, "MB, shared pages counted once")
        figures["packed_speedup"] = figures["efficiency_1x32_packed_8"]
    return figures
