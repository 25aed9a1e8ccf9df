"""`fedpost bench lora`, `tiny`, `big_update`, `cohort` and `gpu`: whole rounds against a bare PyTorch loop in one run.

No figure is printed unless both have the same vector after the first round. On a GPU, which the bare loop's one process
has for itself, this gate is in float32; bfloat16, which is timed, differs by what AdamW makes of its rounding.
"""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config.sections import Model
from engine.messages.errors import RunError
from experiments.bench.bare import PROCESSES, compare
from experiments.bench.harness import Bench, seconds_of, write_llama, write_rows
from experiments.bench.sampling import command_mb
from experiments.config.recipe import Recipe
from experiments.preflight.processes import in_fresh_process

CLIENTS, COHORT, ROWS = 40, 10, 24  # of `lora`
# Rows of a step, tokens of a row, lanes, and a cohort that fills the lanes of each slot equally often.
CASES = (
    (4, 128, 1, COHORT),  # the recipe that other frameworks were measured on
    *((batch, 32, 8, 32) for batch in (1, 2, 4)),
    *((batch, 128, 8, 16) for batch in (1, 2, 4)),
    *((batch, 32, 1, COHORT) for batch in (1, 2, 4)),
    *((batch, 128, 1, COHORT) for batch in (1, 2)),
)
TINY = (16, 24, 1, 2)  # ten thousand parameters
TINY_ROWS, WORDS = 8, 8
SIZES = {"1e3": (1_000, 100, 20), "1e5": (100_000, 1_000, 6)}  # clients, cohort, rounds of `tiny`
SMALL_SIZES = {"1e3": (1_000, 100, 2), "1e5": (2_000, 200, 2)}
LANES = 25  # a cohort of 100 fills them twice in each slot
VOCABULARY = 195_000  # of `big_update`: twice times the width of 64, 25 million parameters
GPU_CASES = ((1, 128, 1), (1, 128, 16), (2, 128, 16), (1, 512, 8), (2, 512, 8))  # rows of a step, tokens, lanes
SHARE = 0.05  # of the change in bfloat16; on a CPU it is 0.0003
SQUARE, TRIES = 8192, 1000  # of the matrix product that shows the GPU's rate: enough of them to raise its clock


def case_name(batch: int, length: int, lanes: int) -> str:
    """A case as figures name it: 1x128_lanes_8."""
    return f"{batch}x{length}" + (f"_lanes_{lanes}" if lanes > 1 else "")


def lora_recipe(bench: Bench, rounds: int, batch: int, length: int, *changes: str) -> Recipe:
    """LoRA clients of 4 steps each, with further changes."""
    train = f'train={{steps=4, batch={batch}, max_length={length}, optimizer={{kind="adamw", eps=1e-6}}}}'
    return bench.recipe(f"rounds={rounds}", f"clients.slots={PROCESSES}", f"cohort.size={COHORT}", train, *changes)


def write_lora_inputs(bench: Bench) -> None:
    """Writes the base, a small random Llama, and the rows of 40 clients."""
    write_llama(bench.folder / "base", (256, 512, 4, 4))
    write_rows(bench.folder, CLIENTS, ROWS, 3 * 128)


def lora(bench: Bench) -> None:
    """Measures tokens per second of LoRA clients by case, in lanes and one at a time, and all processes' memory."""
    write_lora_inputs(bench)
    for place, (batch, length, lanes, size) in enumerate(CASES[:2] if bench.small else CASES):
        end, rounds = f"_{case_name(batch, length, lanes)}" if place else "", 2 if bench.small else 8 if place else 15
        bench.say(f"{batch} rows of {length} tokens a step, {lanes} of {size} clients at once")
        work = lora_recipe(bench, rounds, batch, length, f"clients.lanes={lanes}", f"cohort.size={size}")
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
    clients, peft = f"clients={{slots={PROCESSES}, lanes={lanes}}}", f"model.peft={'none' if lanes == 1 else 'lora'}"
    train = f'train={{steps=1, batch={TINY_ROWS}, max_length=16, optimizer={{kind="sgd", lr=0.1}}}}'
    return bench.recipe(f"rounds={rounds}", f"cohort.size={cohort}", clients, train, peft, rows=rows)


def tiny(bench: Bench) -> None:
    """Measures clients per second where a client is one small step: one at a time, and in the smaller size in lanes."""
    write_llama(bench.folder / "base", TINY, of_bytes=True)
    for size, (clients, cohort, rounds) in (SMALL_SIZES if bench.small else SIZES).items():
        bench.say(f"rows of {clients:,} clients")
        write_rows(rows := bench.folder / size, clients, TINY_ROWS, WORDS)
        for key, lanes in ((f"clients_ratio_{size}", 1), ("lanes_ratio", LANES))[: 2 if size == "1e3" else 1]:
            bench.say(f"{rounds} rounds of {cohort:,} of them, {lanes} at once")
            compared = compare(tiny_recipe(bench, cohort, rounds, lanes, rows), rows / key)
            bench.add(key, compared.ratio, "of the bare loop's clients/s")
            bench.add(f"apart_{key}", compared.apart, "largest difference")
            bench.add(f"ms_per_client_{key}", compared.best_round_s / cohort * 1e3, "ms, best round")


def cohort(bench: Bench) -> None:
    """Measures milliseconds a client of `tiny` and the ratio to the bare loop by the size of the cohort."""
    cohorts = {100: 3} if bench.small else {10: 8, 100: 8, 1_000: 8, 10_000: 3}  # rounds by cohort
    write_llama(bench.folder / "base", TINY, of_bytes=True)
    write_rows(bench.folder, max(cohorts), TINY_ROWS, WORDS)
    for size, rounds in cohorts.items():
        bench.say(f"{rounds} rounds of {size:,} clients")
        compared = compare(tiny_recipe(bench, size, rounds, lanes=1), bench.folder / f"run-{size}")
        bench.add(f"ms_per_client_{size}", compared.best_round_s / size * 1e3, "ms, the best round")
        bench.add(f"clients_ratio_{size}", compared.ratio, "of the bare loop's clients/s")


def big_update(bench: Bench) -> None:
    """Measures time and memory of an update of 25 million parameters with hardly any training."""
    write_llama(bench.folder / "base", (64, 64, 1, 2), vocabulary=VOCABULARY // 10 if bench.small else VOCABULARY)
    write_rows(bench.folder, 40, 1, 8)
    size = f"rounds={3 if bench.small else 8}", f"clients.slots={PROCESSES}", "cohort.size=20", "model.peft=none"
    work = bench.recipe(*size, 'train={steps=1, batch=1, max_length=8, optimizer={kind="sgd", lr=0.1}}')
    compared = compare(work, bench.folder / "run")
    bench.add("time_ratio", 1 / compared.ratio, "times the bare loop's time")
    bench.add("apart", compared.apart, "largest difference")
    _add_memory(bench, work)


def gpu(bench: Bench) -> None:
    """Measures speed by case and the used share of the GPU's arithmetic; RunError without a GPU unless it is small."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not bench.small:
        raise RunError("fedpost bench gpu needs a GPU that torch can use; without one, --small tries it on the CPU")
    bench.say("base and rows")
    write_llama(bench.folder / "base", (32, 64, 2, 2) if bench.small else (1024, 4096, 28, 16), vocabulary=32_000)
    write_rows(bench.folder, CLIENTS, ROWS, 3 * 512)
    peak = in_fresh_process(peak_flops) if has_gpu else None
    for batch, length, lanes in GPU_CASES[:2] if bench.small else GPU_CASES:
        case = case_name(batch, length, lanes)
        clients = f"clients={{slots=1, num_gpus={int(has_gpu)}, lanes={lanes}}}"
        rounds = 3 if bench.small else 6
        work = lora_recipe(bench, rounds, batch, length, "cohort.size=32", 'model.dtype="bfloat16"', clients)
        bench.say(f"{batch} rows of {length} tokens a step, {lanes} clients at once: the first round in float32")
        single = replace(work, rounds=2, model=replace(work.model, dtype="float32"))
        bench.add(f"apart_{case}", compare(single, bench.folder / f"gate-{case}").apart, "largest difference")
        bench.say(f"the same: {work.rounds} rounds in bfloat16")
        compared = compare(work, bench.folder / f"run-{case}", tolerance=math.inf)
        if not compared.share <= SHARE:
            raise ValueError(f"{case}: in bfloat16 the loops' changes differ by {compared.share:.0%} of the change")
        bench.add(f"share_apart_{case}", compared.share, "of the first round's change, in bfloat16")
        speed = compared.tokens / statistics.median(compared.engine_s[1:])
        bench.add(f"speedup_{case}", compared.ratio, "of the bare loop's tokens/s")
        bench.add(f"tokens_per_s_{case}", speed, "tokens/s of whole rounds")
        used = None if peak is None else speed * flops_per_token(work.model, length) / peak
        bench.add(f"mfu_{case}", used, "of the rate of a large bfloat16 matrix product")
    bench.figures["lanes_speedup"] = bench.figures["speedup_1x128_lanes_16"]
    if peak is not None:
        bench.add("peak_tflops", peak / 1e12, "TFLOP/s of that product")


def flops_per_token(model: Model, length: int) -> float:
    """Operations of a token of a row of `length`, forward and backward without gradients of frozen weights."""
    from experiments.preflight.plan import meta_network, on_meta  # imports transformers

    with FlopCounterMode(display=False) as counted:
        on_meta(meta_network(model), length).sum().backward()
    return float(counted.get_total_flops()) / length


def peak_flops() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on the GPU: the best of many."""
    left, right = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        left @ right
        torch.cuda.synchronize()

    return 2 * SQUARE**3 / min(seconds_of(multiply, TRIES)[0])
