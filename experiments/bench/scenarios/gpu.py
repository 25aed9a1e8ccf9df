"""`fedpost bench gpu`: LoRA clients of a base of half a billion parameters on one GPU, in lanes and one at a time.

The bare loop is one process that has the GPU for itself and trains client after client with PEFT. There are two gates:
in float32 both must have the same vector after the first round, and in bfloat16, which is timed, the same but for what
AdamW makes of its rounding.
"""

import math
import statistics
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config.sections import Model
from engine.messages.errors import RunError
from experiments.bench.bare import compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench, seconds_of
from experiments.bench.scenarios.bare_loop import CLIENTS, ROWS, case_name, lora_recipe
from experiments.preflight.plan import meta_network, on_meta
from experiments.preflight.processes import in_fresh_process

LLAMA, TINY = (1024, 4096, 28, 16), (32, 64, 2, 2)
VOCABULARY = 32_000
CASES = ((1, 128, 1), (1, 128, 16), (2, 128, 16), (1, 512, 8), (2, 512, 8))  # rows of a step, tokens of a row, lanes
ROUNDS = 6
SHARE = 0.05  # on a CPU it is 0.0003
SQUARE, TRIES = 8192, 1000  # of the matrix product that shows the GPU's rate: enough of them to raise its clock


def gpu(bench: Bench) -> None:
    """Measures speed over the bare loop's by case, and the share of the GPU's arithmetic that is used.

    RunError without a GPU, but for a small run; ValueError if the loops disagree.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not bench.small:
        raise RunError("fedpost bench gpu needs a GPU that torch can use; without one, --small tries it on the CPU")
    bench.say("base and rows")
    write_llama(bench.folder / "base", TINY if bench.small else LLAMA, vocabulary=VOCABULARY)
    write_rows(bench.folder, CLIENTS, ROWS, 3 * 512)
    peak = in_fresh_process(peak_flops) if has_gpu else None
    for batch, length, lanes in CASES[:2] if bench.small else CASES:
        case = case_name(batch, length, lanes)
        clients = f"clients={{slots=1, num_gpus={int(has_gpu)}, lanes={lanes}}}"
        changes = "cohort.size=32", 'model.dtype="bfloat16"', clients
        work = lora_recipe(bench, 3 if bench.small else ROUNDS, batch, length, *changes)
        what = f"{batch} rows of {length} tokens a step, {lanes} clients at once"
        bench.say(f"{what}: the first round in float32")
        single = replace(work, rounds=2, model=replace(work.model, dtype="float32"))
        bench.add(f"apart_{case}", compare(single, bench.folder / f"gate-{case}").apart, "largest difference")
        bench.say(f"{what}: {work.rounds} rounds")
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
    """Counts the floating-point operations of one token of a row of `length`, forward and backward, as torch does.

    The frozen weights' gradients, which nobody needs, are not among them.
    """
    network = meta_network(model)
    with FlopCounterMode(display=False) as counted:
        on_meta(network, length).sum().backward()
    return float(counted.get_total_flops()) / length


def peak_flops() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on the GPU: the best of many."""
    left, right = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        left @ right
        torch.cuda.synchronize()

    return 2 * SQUARE**3 / min(seconds_of(multiply, TRIES)[0])
