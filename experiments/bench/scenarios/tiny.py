"""`fedpost bench tiny`: clients per second, where a client is a step of 8 rows of a model of ten thousand parameters.

The rest of the time is the engine's. The bare loop does the same training and averaging in the same run.
"""

from pathlib import Path

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench, scenario
from experiments.config.recipe import Recipe

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS, WORDS, LENGTH = 8, 8, 16
SIZES = {"1e3": (1_000, 100, 20), "1e5": (100_000, 1_000, 6)}  # clients, cohort, rounds
LANES = 25  # a cohort of 100 fills them twice in each slot


def recipe(bench: Bench, cohort: int, rounds: int, lanes: int, rows: Path | None = None) -> Recipe:
    """One step of all rows of a client: full tuning, or with several lanes LoRA, without which there are none."""
    return bench.recipe(
        *(f"rounds={rounds}", f"clients={{slots={PROCESSES}, lanes={lanes}}}", f"cohort.size={cohort}"),
        f'train={{steps=1, batch={ROWS}, max_length={LENGTH}, optimizer={{kind="sgd", lr=0.1}}}}',
        f"model.peft={'none' if lanes == 1 else 'lora'}",
        rows=rows,
    )


@scenario()
def measure(bench: Bench) -> None:
    """Measures clients per second one at a time in both sizes, and in lanes in the smaller; ValueError on a gate."""
    write_llama(bench.folder / "base", LLAMA, of_bytes=True)
    for size, (clients, cohort, rounds) in SIZES.items():
        rows = bench.folder / size
        if bench.small:
            rounds = 2
            clients, cohort = (2_000, 200) if size == "1e5" else (clients, cohort)
        bench.say(f"rows of {clients:,} clients")
        write_rows(rows, clients, ROWS, WORDS)
        for key, lanes in ((f"clients_ratio_{size}", 1), ("lanes_ratio", LANES))[: 2 if size == "1e3" else 1]:
            bench.say(f"{rounds} rounds of {cohort:,} of them, {lanes} at once")
            compared = compare(recipe(bench, cohort, rounds, lanes, rows), rows / key)
            bench.add(key, compared.ratio, "of the bare loop's clients/s")
            bench.add(f"apart_{key}", compared.apart, "largest difference")
            bench.add(f"ms_per_client_{key}", compared.best_round_s / cohort * 1e3, "ms, best round")
