"""`fedpost bench zero`: what it costs to be many clients in one gang, for ZeRO stages 1 to 3 with two ranks on the CPU.

Where there are GPUs the same is measured on them too, with a whole one for each rank, and so with one rank on one GPU.

No figure is printed unless a run's first round leads where bare DeepSpeed loops lead, each client in a fresh engine.
The bare loop is DeepSpeed's, on the same batches in the same kind of processes, without Ray, resets, sums or a
server. A gang's tokens per second are of whole rounds.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from datasets_partition.store.store import Store
from engine.config.sections import Zero
from engine.records.checkpoint import load_checkpoint
from engine.workers.token_columns import token_columns
from experiments.bench.bases import write_llama
from experiments.bench.harness import Bench, largest_difference, metric
from experiments.bench.sampling import stored_bytes, workers_mb
from experiments.bench.scenarios.bare_loop import CLIENTS, lora_recipe, write_lora_inputs
from experiments.bench.zero_ranks import Bare, Work, bare, in_ranks, loaded
from experiments.config.recipe import Recipe, parse_recipe, to_toml
from experiments.preflight.processes import memory
from experiments.runs.api import build_store

STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
RANKS = 2
ON_GPU = "_gpu"  # the end of the figures' names
TOLERANCE = 2e-5  # of weights after a round: both do the same, and add in another order
LARGE = (1024, 2816, 12, 8)


def zero(bench: Bench) -> None:
    """Measures all stages; ValueError when the two loops disagree on the CPU."""
    write_lora_inputs(bench)
    steps, rounds, cohort = (2, 2, 2) if bench.small else (10, 5, 10)
    work = lora_recipe(
        *(bench, rounds, 4, 128, "model.peft=none", "clients.slots=1"),
        *(f"train.steps={steps}", f"cohort.size={cohort}"),
    )
    if not bench.small:  # some 600 MB, so that a shard stands out from what a process takes anyway
        write_llama(bench.folder / "large", LARGE, vocabulary=8192)
    for stage in STAGES:
        gang = Zero(stage=stage, ranks=RANKS)
        _measure_stage(bench, work, gang, "")
        if not bench.small:
            bench.say(f"stage {stage}: loading a larger model")
            sizes = in_ranks(gang, False, loaded, replace(work.model, base=str(bench.folder / "large")), gang)
            peak = None if None in sizes else max(growth / shard for growth, shard in sizes)
            bench.add(f"peak_over_shard_s{stage}", peak, "growth / (a rank's shard + the largest tensor)")
    gpus = torch.cuda.device_count()
    on_gpu = replace(work, clients=replace(work.clients, num_gpus=1.0))
    for stage in STAGES if gpus else ():
        try:
            _measure_stage(bench, on_gpu, Zero(stage=stage, ranks=min(RANKS, gpus)), ON_GPU)
        except (ValueError, RuntimeError) as error:  # the CPU's figures stand
            bench.say(f"stage {stage} on GPUs: no figures, since {error}")


def _measure_stage(bench: Bench, work: Recipe, zero: Zero, where: str) -> None:
    """Measures one stage on one kind of device, which `where` names at the end of the figures' names."""
    stage, end = f"stage {zero.stage}{' on GPUs' if where else ''}", f"s{zero.stage}{where}"
    bench.say(f"{stage}: bare loops, resets and fresh engines")
    plain = _bare(work, zero, 2 if bench.small else 7)
    bench.say(f"{stage}: rounds through the engine")
    run, stored = bench.run(replace(work, clients=replace(work.clients, zero=zero)), end, stored_bytes)
    apart = gate(run.folder, zero, [rank.first_S for rank in plain])
    speed = statistics.median(metric(run, "tokens_per_s")[1:])
    size = sum(tensor.numel() for file in run.model.glob("*.safetensors") for tensor in load_file(file).values())
    moved, first = (stored[-1] - stored[0]) / (len(stored) - 1), plain[0]
    figures = {
        "reset_share": (first.reset_s / first.client_s, f"of a client of {work.train.steps} steps"),
        "reset_speedup": (first.fresh_s / first.reset_s, "fresh engine / reset"),
        "reset_ms": (first.reset_s * 1e3, "ms"),
        "fresh_s": (first.fresh_s, "s"),
        "apart": (apart, "largest difference after the first round"),
        "loop_efficiency": (speed / first.tokens_per_s, "of the bare loop"),
        "tokens_per_s": (speed, "tokens/s"),
        "bare_tokens_per_s": (first.tokens_per_s, "tokens/s"),
        "bytes_over_bound": (moved / (size * (4 + 8)), "of P (4 + 8 gangs), by Ray's own count"),
        "rss_slope_mb_per_client": _growth(bench, work, zero, stage, f"{end}-short"),
    }
    for name, (value, unit) in figures.items():
        bench.add(f"{name}_{end}", value, unit)


def _bare(work: Recipe, zero: Zero, tries: int) -> list[Bare]:
    """What each rank measures without the engine."""
    store = build_store(work)
    cohort = work.cohort.sample(Store.open(store).num_training, work.seed, 0).tolist()
    inputs = Work(work, zero, token_columns(store, work), cohort, tries)
    return in_ranks(zero, work.clients.num_gpus > 0, bare, inputs)


def gate(folder: Path, zero: Zero, plain: list[np.ndarray]) -> float:
    """How far a run's shards after its first round are from the `plain` ones; ValueError where that is too far."""
    saved = load_checkpoint(folder / "checkpoints", 1)
    assert saved is not None
    shards = np.concatenate([part.params.numpy() for part in saved.state.parts])
    what = f"stage {zero.stage}: after the first round the gang and bare loops"
    return largest_difference(what, shards, np.concatenate(plain), TOLERANCE)


def _growth(bench: Bench, work: Recipe, zero: Zero, stage: str, name: str) -> tuple[float | None, str]:
    """How the ranks' memory grows from client to client, once the first quarter of them is past."""
    rounds = 2 if bench.small else 20
    short = parse_recipe(to_toml(work), ["train.steps=1", f"rounds={rounds}"])
    short = replace(short, clients=replace(short.clients, zero=zero))
    cohort = work.cohort.expected(CLIENTS)
    bench.say(f"{stage}: {rounds * cohort:g} short clients in one gang")
    _, held = bench.run(short, name, lambda: sum(workers_mb(("Gang", "Rank"), anonymous_mb)))
    if not all(held):
        return None, "not on this system"
    later = np.array(held[len(held) // 4 :])
    slope = float(np.polyfit(np.arange(len(later)) * cohort, later, 1)[0]) / zero.ranks
    return slope, f"MB a client and rank, {len(later)} rounds"


def anonymous_mb(process: psutil.Process) -> float:
    """Memory that is the process's alone; pages of files and of the object store are not."""
    return memory(process.pid).get("RssAnon", 0.0)
