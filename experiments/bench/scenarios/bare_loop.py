"""`fedpost bench lora`, `tiny`, `big_update` and `cohort`: whole rounds against a bare PyTorch loop in the same run.

No figure is printed unless both have the same vector after the first round.
"""

from dataclasses import replace
from pathlib import Path

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench
from experiments.bench.sampling import command_mb
from experiments.config.recipe import Recipe

CLIENTS, COHORT, ROWS, STEPS = 40, 10, 24, 4  # of `lora`
# Rows of a step, tokens of a row, lanes, and a cohort that fills the lanes of each slot equally often.
# The first is the recipe that other frameworks were measured on.
CASES = (
    (4, 128, 1, COHORT),
    *((batch, 32, 8, 32) for batch in (1, 2, 4)),
    *((batch, 128, 8, 16) for batch in (1, 2, 4)),
    *((batch, 32, 1, COHORT) for batch in (1, 2, 4)),
    *((batch, 128, 1, COHORT) for batch in (1, 2)),
)
TINY = (16, 24, 1, 2)  # ten thousand parameters
SIZES = {"1e3": (1_000, 100, 20), "1e5": (100_000, 1_000, 6)}  # clients, cohort, rounds of `tiny`
TINY_ROWS, WORDS = 8, 8
LANES = 25  # a cohort of 100 fills them twice in each slot
VOCABULARY = 195_000  # of `big_update`: twice times the width of 64, 25 million parameters, and a step on one short row
CLIENTS_PER_S = "of the bare loop's clients/s"


def case_name(batch: int, length: int, lanes: int) -> str:
    """A case as figures name it: 1x128_lanes_8."""
    return f"{batch}x{length}" + (f"_lanes_{lanes}" if lanes > 1 else "")


def lora_recipe(bench: Bench, rounds: int, batch: int, length: int, *changes: str) -> Recipe:
    """LoRA clients of 4 steps each, with further changes."""
    adamw = 'optimizer={kind="adamw", eps=1e-6}'
    train = f"train={{steps={STEPS}, batch={batch}, max_length={length}, {adamw}}}"
    return bench.recipe(f"rounds={rounds}", f"clients.slots={PROCESSES}", f"cohort.size={COHORT}", train, *changes)


def write_lora_inputs(bench: Bench) -> None:
    """Writes the base, a small random Llama, and the rows of 40 clients."""
    write_llama(bench.folder / "base", (256, 512, 4, 4))
    write_rows(bench.folder, CLIENTS, ROWS, 3 * 128)


def lora(bench: Bench) -> None:
    """Measures tokens per second of LoRA clients by case, in lanes and one at a time, and all processes' memory."""
    write_lora_inputs(bench)
    for place, (batch, length, lanes, size) in enumerate(CASES[:2] if bench.small else CASES):
        end, rounds = f"_{case_name(batch, length, lanes)}" if place else "", 8 if place else 15
        bench.say(f"{batch} rows of {length} tokens a step, {lanes} of {size} clients at once")
        changes = f"clients.lanes={lanes}", f"cohort.size={size}"
        work = lora_recipe(bench, 2 if bench.small else rounds, batch, length, *changes)
        compared = compare(work, bench.folder / f"run{end}")
        bench.add(f"efficiency{end}", compared.ratio, "of the bare loop's tokens/s")
        bench.add(f"apart{end}", compared.apart, "largest difference")
        if not place:
            bench.add("tokens_per_s", compared.tokens / compared.best_round_s, "tokens/s, the best round")
            _add_memory(bench, work)
    bench.figures["lanes_speedup"] = bench.figures["efficiency_1x32_lanes_8"]


def _add_memory(bench: Bench, work: Recipe) -> None:
    rss, pss = command_mb(replace(work, rounds=min(3, work.rounds)), bench.folder / "command")
    bench.add("tree_rss_mb", rss, "MB, all processes but Ray's daemons")
    bench.add("tree_pss_mb", pss, "MB, shared pages counted once")


def tiny_recipe(bench: Bench, cohort: int, rounds: int, lanes: int, rows: Path | None = None) -> Recipe:
    """One step of all rows of a client: full tuning, or with several lanes LoRA, without which there are none."""
    return bench.recipe(
        *(f"rounds={rounds}", f"clients={{slots={PROCESSES}, lanes={lanes}}}", f"cohort.size={cohort}"),
        f'train={{steps=1, batch={TINY_ROWS}, max_length=16, optimizer={{kind="sgd", lr=0.1}}}}',
        f"model.peft={'none' if lanes == 1 else 'lora'}",
        rows=rows,
    )


def tiny(bench: Bench) -> None:
    """Measures clients per second where a client is one small step: one at a time, and in the smaller size in lanes."""
    write_llama(bench.folder / "base", TINY, of_bytes=True)
    for size, (clients, cohort, rounds) in SIZES.items():
        rows = bench.folder / size
        if bench.small:
            clients, cohort, rounds = (2_000, 200, 2) if size == "1e5" else (clients, cohort, 2)
        bench.say(f"rows of {clients:,} clients")
        write_rows(rows, clients, TINY_ROWS, WORDS)
        for key, lanes in ((f"clients_ratio_{size}", 1), ("lanes_ratio", LANES))[: 2 if size == "1e3" else 1]:
            bench.say(f"{rounds} rounds of {cohort:,} of them, {lanes} at once")
            compared = compare(tiny_recipe(bench, cohort, rounds, lanes, rows), rows / key)
            bench.add(key, compared.ratio, CLIENTS_PER_S)
            bench.add(f"apart_{key}", compared.apart, "largest difference")
            bench.add(f"ms_per_client_{key}", compared.best_round_s / cohort * 1e3, "ms, best round")


def cohort(bench: Bench) -> None:
    """Measures milliseconds a client of `tiny` and the ratio to the bare loop by the size of the cohort."""
    cohorts = (100,) if bench.small else (10, 100, 1_000, 10_000)
    write_llama(bench.folder / "base", TINY, of_bytes=True)
    write_rows(bench.folder, cohorts[-1], TINY_ROWS, WORDS)
    for size in cohorts:
        rounds = 3 if bench.small or size > 1_000 else 8
        bench.say(f"{rounds} rounds of {size:,} clients")
        compared = compare(tiny_recipe(bench, size, rounds, lanes=1), bench.folder / f"run-{size}")
        bench.add(f"ms_per_client_{size}", compared.best_round_s / size * 1e3, "ms, the best round")
        bench.add(f"clients_ratio_{size}", compared.ratio, CLIENTS_PER_S)


def big_update(bench: Bench) -> None:
    """Measures time and memory of an update of 25 million parameters with hardly any training."""
    write_llama(bench.folder / "base", (64, 64, 1, 2), vocabulary=VOCABULARY // 10 if bench.small else VOCABULARY)
    write_rows(bench.folder, 40, 1, 8)
    work = bench.recipe(
        *(f"rounds={3 if bench.small else 8}", f"clients.slots={PROCESSES}", "cohort.size=20", "model.peft=none"),
        'train={steps=1, batch=1, max_length=8, optimizer={kind="sgd", lr=0.1}}',
    )
    compared = compare(work, bench.folder / "run")
    bench.add("time_ratio", 1 / compared.ratio, "times the bare loop's time")
    _add_memory(bench, work)
    bench.add("apart", compared.apart, "largest difference")
