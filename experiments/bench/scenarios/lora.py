"""`fedpost bench lora`: rounds of LoRA clients, in lanes and one at a time, against a bare PyTorch loop in one run.

No figure is printed unless both have the same vector after the first round.
"""

from dataclasses import replace

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench, scenario
from experiments.bench.sampling import command_mb
from experiments.config.recipe import Recipe

CLIENTS, COHORT, ROWS, STEPS = 40, 10, 24, 4
LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
# Rows of a step, tokens of a row, lanes, and a cohort that fills the lanes of each slot equally often.
# The first is the recipe that other frameworks were measured on.
CASES = (
    (4, 128, 1, COHORT),
    *((batch, 32, 8, 32) for batch in (1, 2, 4)),
    *((batch, 128, 8, 16) for batch in (1, 2, 4)),
    *((batch, 32, 1, COHORT) for batch in (1, 2, 4)),
    *((batch, 128, 1, COHORT) for batch in (1, 2)),
)


def case_name(batch: int, length: int, lanes: int) -> str:
    """A case as figures name it: 1x128_lanes_8."""
    return f"{batch}x{length}" + (f"_lanes_{lanes}" if lanes > 1 else "")


def recipe(bench: Bench, rounds: int, batch: int, length: int, *changes: str) -> Recipe:
    """LoRA clients of 4 steps each, with further changes."""
    adamw = 'optimizer={kind="adamw", eps=1e-6}'
    train = f"train={{steps={STEPS}, batch={batch}, max_length={length}, {adamw}}}"
    return bench.recipe(f"rounds={rounds}", f"clients.slots={PROCESSES}", f"cohort.size={COHORT}", train, *changes)


def write_inputs(bench: Bench) -> None:
    """Writes the base, a small random Llama, and the rows of 40 clients."""
    write_llama(bench.folder / "base", LLAMA)
    write_rows(bench.folder, CLIENTS, ROWS, 3 * 128)


@scenario()
def measure(bench: Bench) -> None:
    """Measures tokens per second over the bare loop's by case, and the memory of all processes."""
    write_inputs(bench)
    for batch, length, lanes, cohort in CASES[:2] if bench.small else CASES:
        is_first, case = not bench.figures, case_name(batch, length, lanes)
        bench.say(f"{batch} rows of {length} tokens a step, {lanes} of {cohort} clients at once")
        rounds = 2 if bench.small else 15 if is_first else 8
        work = recipe(bench, rounds, batch, length, f"clients.lanes={lanes}", f"cohort.size={cohort}")
        compared = compare(work, bench.folder / f"run-{case}")
        bench.add("efficiency" if is_first else f"efficiency_{case}", compared.ratio, "of the bare loop's tokens/s")
        bench.add("apart" if is_first else f"apart_{case}", compared.apart, "largest difference")
        if is_first:
            bench.add("tokens_per_s", compared.tokens / compared.best_round_s, "tokens/s, the best round")
            rss, pss = command_mb(replace(work, rounds=min(3, rounds)), bench.folder / "command")
            bench.add("tree_rss_mb", rss, "MB, all processes but Ray's daemons")
            bench.add("tree_pss_mb", pss, "MB, shared pages counted once")
    bench.figures["lanes_speedup"] = bench.figures["efficiency_1x32_lanes_8"]
