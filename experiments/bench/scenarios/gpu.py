"""`fedpost bench gpu`: LoRA clients of a base of half a billion parameters on one GPU, in packs and one at a time.

The bare loop is one process that has the GPU for itself and trains client after client with PEFT. There are two gates:
in float32 both must have the same vector after the first round, and in bfloat16, which is timed, the same but for what
AdamW makes of its rounding.
"""

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config.sections import Model
from engine.models.adapters import with_adapters
from experiments.bench.bare import compare
from experiments.bench.bases import bench_recipe, write_llama, write_rows
from experiments.bench.results import Figure, Steps
from experiments.bench.scenarios.lora import CLIENTS, ROWS, STEPS
from experiments.config.recipe import Recipe
from experiments.preflight.processes import in_fresh_process
from experiments.runs.api import ray_session

LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = 32_000
COHORT = 32
CASES = ((1, 128, 1), (1, 128, 16), (2, 128, 16), (1, 512, 8), (2, 512, 8))  # rows of a step, tokens of a row, lanes
ROUNDS = 6
SHARE = 0.05  # on a CPU it is 0.0003
SQUARE, TRIES = 8192, 1000  # of the matrix product that shows what the GPU can do: so many that its clock rises


def measure(small: bool) -> dict[str, Figure]:
    """Speed over the bare loop's by case, and the share of the GPU's arithmetic that is used.

    ValueError without a GPU, but for a small run, or where the loops disagree.
    """
    gpu = torch.cuda.is_available()
    if not gpu and not small:
        raise ValueError("fedpost bench gpu needs a GPU that torch can use; without one, --small tries it on the CPU")
    steps, figures = Steps(), dict[str, Figure]()
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        steps.say("base and rows")
        write_llama(folder / "base", TINY if small else LLAMA, vocabulary=VOCABULARY)
        write_rows(folder / "rows.parquet", CLIENTS, ROWS, 3 * 512)
        peak = in_fresh_process(peak_flops) if gpu else None
        for batch, length, lanes in CASES[:2] if small else CASES:
            case = f"{batch}x{length}" + (f"_packed_{lanes}" if lanes > 1 else "")
            work = recipe(folder, 3 if small else ROUNDS, batch, length, lanes, gpu=gpu)
            steps.say(f"{batch} rows of {length} tokens a step, {lanes} clients at once: the first round in float32")
            single = replace(work, rounds=2, model=replace(work.model, dtype="float32"))
            figures[f"apart_{case}"] = Figure(compare(single, folder / f"gate-{case}").apart, "largest difference")
            steps.say(f"{batch} rows of {length} tokens a step, {lanes} clients at once: {work.rounds} rounds")
            found = compare(work, folder / f"run-{case}", tolerance=math.inf)
            if not found.share <= SHARE:
                raise ValueError(f"{case}: in bfloat16 the loops' changes differ by {found.share:.0%} of the change")
            figures[f"share_apart_{case}"] = Figure(found.share, "of the first round's change, in bfloat16")
            speed = found.tokens / statistics.median(found.engine_s[1:])
            figures[f"speedup_{case}"] = Figure(found.ratio, "of the bare loop's tokens/s")
            figures[f"tokens_per_s_{case}"] = Figure(speed, "tokens/s of whole rounds")
            used = None if peak is None else speed * flops_per_token(work.model, length) / peak
            figures[f"mfu_{case}"] = Figure(used, "of the rate of a large bfloat16 matrix product")
    figures["packed_speedup"] = figures["speedup_1x128_packed_16"]
    if peak is not None:
        figures["peak_tflops"] = Figure(peak / 1e12, "TFLOP/s of that product")
    return figures


def recipe(folder: Path, rounds: int, batch: int, length: int, lanes: int, *, gpu: bool) -> Recipe:
    """As of `fedpost bench lora`, in bfloat16, with one slot that has a whole GPU if there is one."""
    return bench_recipe(
        folder,
        folder / "base",
        f"""
        rounds = {rounds}
        clients = {{ slots = 1, num_gpus = {int(gpu)}, lanes = {lanes} }}
        cohort = {{ size = {COHORT} }}
        model = {{ dtype = "bfloat16" }}
        [train]
        steps = {STEPS}
        batch = {batch}
        max_length = {length}
        optimizer = {{ kind = "adamw", eps = 1e-6 }}
        """,
    )


def flops_per_token(model: Model, length: int) -> float:
    """Floating-point operations that one token of a row of `length` takes forward and backward, by torch's own count.

    The frozen weights' gradients, which nobody needs, are not in it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.base))
        network = with_adapters(network.requires_grad_(False), model)
        ids = torch.zeros(1, length, dtype=torch.long)
        # A mask that is made already, as in plan.py.
        mask = torch.zeros(1, 1, length, length)
        network(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    return float(counted.get_total_flops()) / length


def peak_flops() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on the GPU: the best of many."""
    left, right = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(TRIES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * SQUARE**3 / min(seconds)
