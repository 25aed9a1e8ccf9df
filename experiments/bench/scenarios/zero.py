"""`fedpost bench zero`: what it costs to train many clients in one gang, by ZeRO stage, with two ranks on the CPU.

On GPUs, if there are any, the same is measured with a whole one for each rank. No figure is printed unless a run's
first round leads where bare DeepSpeed loops lead, each client in a fresh engine. The bare loop trains on the same
batches in the same kind of processes, without Ray, resets, sums or a server. A gang's tokens per second are of whole
rounds. Legend: S of a rank's shard.
"""

import gc
import multiprocessing
import os
import socket
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.sections import Model, Zero
from engine.config.train import Train
from engine.models.base_model import always_the_same_bits
from engine.objectives.token_batch import token_losses
from engine.system import allocator as heap
from engine.system.rendezvous import meet
from engine.training.step_loop import Training, batches
from engine.workers.token_columns import token_columns
from experiments.bench.bare import after_first_round
from experiments.bench.harness import Bench, largest_difference, metric, seconds_of, write_llama
from experiments.bench.sampling import sampled, stored_bytes, workers_mb
from experiments.bench.scenarios.bare_loop import CLIENTS, lora_recipe, write_lora_inputs
from experiments.config.recipe import Recipe
from experiments.preflight.processes import memory
from experiments.runs.api import build_store
from strategies.core.seeds import rng, torch_seed

STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
RANKS = 2
TOLERANCE = 2e-5  # of weights after a round: both do the same, and add in another order
LOOPBACK = "127.0.0.1"


def zero(bench: Bench) -> None:
    """Measures all stages; ValueError when the two loops disagree on the CPU."""
    write_lora_inputs(bench)
    rounds, size = (2, ("train.steps=2", "cohort.size=2")) if bench.small else (5, ("train.steps=10", "cohort.size=10"))
    work = lora_recipe(bench, rounds, 4, 128, "model.peft=none", "clients.slots=1", *size)
    if not bench.small:  # some 600 MB, so that a shard stands out from what a process takes anyway
        write_llama(bench.folder / "large", (1024, 2816, 12, 8), vocabulary=8192)
    for stage in STAGES:
        _measure_stage(bench, work, gang := Zero(stage=stage, ranks=RANKS), "")
        if not bench.small:
            bench.say(f"stage {stage}: loading a larger model")
            sizes = in_ranks(gang, False, loaded, replace(work.model, base=str(bench.folder / "large")), gang)
            peak = None if None in sizes else max(growth / shard for growth, shard in sizes)
            bench.add(f"peak_over_shard_s{stage}", peak, "growth / (a rank's shard + the largest tensor)")
    gpus = torch.cuda.device_count()
    on_gpu = replace(work, clients=replace(work.clients, num_gpus=1.0))
    for stage in STAGES if gpus else ():
        try:
            _measure_stage(bench, on_gpu, Zero(stage=stage, ranks=min(RANKS, gpus)), "_gpu")
        except (ValueError, RuntimeError) as error:  # the CPU's figures stand
            bench.say(f"stage {stage} on GPUs: no figures, since {error}")


def _measure_stage(bench: Bench, work: Recipe, zero: Zero, where: str) -> None:
    """Measures one stage on one kind of device, which `where` names at the end of the figures' names."""
    stage, end = f"stage {zero.stage}{' on GPUs' if where else ''}", f"s{zero.stage}{where}"
    bench.say(f"{stage}: bare loops, resets and fresh engines")
    store, on_gpu = build_store(work), work.clients.num_gpus > 0
    cohort = work.cohort.sample(Store.open(store).num_training, work.seed, 0).tolist()
    tokens, tries = token_columns(store, work), 2 if bench.small else 7
    plain: list[Bare] = in_ranks(zero, on_gpu, bare, work, zero, tokens, cohort, tries)
    bench.say(f"{stage}: rounds through the engine")
    run, stored = bench.run(replace(work, clients=replace(work.clients, zero=zero)), end, stored_bytes)
    apart = gate(run.folder, zero, [rank.first_S for rank in plain])
    speed = statistics.median(metric(run, "tokens_per_s")[1:])
    size = sum(tensor.numel() for file in run.model.glob("*.safetensors") for tensor in load_file(file).values())
    moved, first = (stored[-1] - stored[0]) / (len(stored) - 1), plain[0]
    for name, value, unit in (
        ("reset_share", first.reset_s / first.client_s, f"of a client of {work.train.steps} steps"),
        ("reset_speedup", first.fresh_s / first.reset_s, "fresh engine / reset"),
        ("reset_ms", first.reset_s * 1e3, "ms"),
        ("fresh_s", first.fresh_s, "s"),
        ("apart", apart, "largest difference after the first round"),
        ("loop_efficiency", speed / first.tokens_per_s, "of the bare loop"),
        ("tokens_per_s", speed, "tokens/s"),
        ("bare_tokens_per_s", first.tokens_per_s, "tokens/s"),
        ("bytes_over_bound", moved / (size * (4 + 8)), "of P (4 + 8 gangs), by Ray's own count"),
        ("rss_slope_mb_per_client", *_growth(bench, work, zero, stage, f"{end}-short")),
    ):
        bench.add(f"{name}_{end}", value, unit)


def gate(folder: Path, zero: Zero, plain: list[np.ndarray]) -> float:
    """How far a run's shards after its first round are from the `plain` ones; ValueError where that is too far."""
    what = f"stage {zero.stage}: after the first round the gang and bare loops"
    return largest_difference(what, after_first_round(folder), np.concatenate(plain), TOLERANCE)


def _growth(bench: Bench, work: Recipe, zero: Zero, stage: str, name: str) -> tuple[float | None, str]:
    """How the ranks' memory grows from client to client, once the first quarter of them is past."""
    rounds, cohort, clients = 2 if bench.small else 20, work.cohort.expected(CLIENTS), replace(work.clients, zero=zero)
    short = replace(work, rounds=rounds, train=replace(work.train, steps=1), clients=clients)
    bench.say(f"{stage}: {rounds * cohort:g} short clients in one gang")
    _, held = bench.run(short, name, lambda: sum(workers_mb(("Gang", "Rank"), "RssAnon")))
    if not all(held):
        return None, "not on this system"
    later = np.array(held[len(held) // 4 :])
    slope = float(np.polyfit(np.arange(len(later)) * cohort, later, 1)[0]) / zero.ranks
    return slope, f"MB a client and rank, {len(later)} rounds"


class Bare(NamedTuple):
    """Seconds of a fresh engine, a reset, and a client of the recipe's steps; the bare loop's tokens per second."""

    fresh_s: float
    reset_s: float
    client_s: float
    tokens_per_s: float
    first_S: np.ndarray  # where the first round leads: the mean of bare loops, each in a fresh engine


def in_ranks(zero: Zero, gpu: bool, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls `work(rank, *arguments)` in a fresh process for each rank of a gang; with `gpu` each has one to itself."""
    with socket.create_server((LOOPBACK, 0)) as listening:
        port = listening.getsockname()[1]
    with ProcessPoolExecutor(zero.ranks, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_rank, rank, zero, gpu, port, work, arguments) for rank in range(zero.ranks)]
        return [rank.result() for rank in ranks]


def _rank(rank: int, zero: Zero, gpu: bool, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if gpu:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(zero.ranks))))
        os.environ["CUDA_VISIBLE_DEVICES"] = shown.split(",")[rank]
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    always_the_same_bits()
    listening = socket.create_server((LOOPBACK, port)) if rank == 0 else None
    meet(rank, zero.ranks, LOOPBACK, port, listening, timeout_s=zero.timeout_s, gpu=gpu)
    measured = work(rank, *arguments)
    dist.barrier()
    return measured


def bare(rank: int, work: Recipe, zero: Zero, token_folder: Path, cohort: list[int], tries: int) -> Bare:
    """Measures one rank's times with a cohort, one client's steps `tries` times; all ranks do the same at once."""
    from engine.models.deepspeed_model import zero_model
    from engine.training.deepspeed_training import ZeroTrainer

    train, tokens = work.train, Tokens.open(token_folder)

    def fresh() -> ZeroTrainer:
        network = zero_model(work.model, zero, torch_seed(work.seed, 0, -1, "initial"), rank)
        return ZeroTrainer(network, 0, work.model, zero, train)

    def stream(client: int) -> np.random.Generator:
        return rng(work.seed, 0, client, "batches")

    trainer = fresh()  # the first engine also loads libraries: it is not timed
    start_S = trainer.weights()
    total_S, weights, fresh_s = torch.zeros_like(start_S), 0, []
    for client in cohort:
        trainer.engine.destroy()
        del trainer
        gc.collect()  # an engine refers to itself
        seconds, trainer = seconds_of(fresh)
        fresh_s += seconds
        rows = tokens.rows(client, "train")
        _bare_loop(trainer, rows, train, stream(client))
        total_S.add_(trainer.weights().sub_(start_S), alpha=rows.num_rows)
        weights += rows.num_rows
    client, rows = cohort[0], tokens.rows(cohort[0], "train")

    def speed() -> float:
        seconds, trained = seconds_of(lambda: _bare_loop(trainer, rows, train, stream(client)), tries)
        return float(trained / statistics.median(seconds))

    speeds = [speed()]
    heap.keep(gathered=zero.stage == 3)  # as a gang does; the bare loop counts with the faster setting
    speeds.append(speed())

    def reset() -> None:
        trainer.become(start_S)
        trainer.summed(0.0)  # waits for a GPU

    reset_s, _ = seconds_of(reset, 7)
    client_s, _ = seconds_of(lambda: trainer.train([Training(rows, start_S, stream(client), 0)], train), tries)
    first_S = start_S.add_(total_S, alpha=1 / weights).cpu().numpy()
    fresh_median, reset_median, client_median = map(statistics.median, (fresh_s, reset_s, client_s))
    return Bare(fresh_median, reset_median, client_median, max(speeds), first_S)


def _bare_loop(trainer: Any, rows: Any, train: Train, stream: np.random.Generator) -> float:
    """DeepSpeed's loop on the same batches, with what every loop must do: forward, backward, clip, step."""
    engine, rank, ranks = trainer.engine, trainer.rank, trainer.ranks
    engine.train()
    tokens = 0
    for picked in batches(rows.num_rows, train, stream):
        batch = trainer.objective.collate(rows.take(picked[rank::ranks]), trainer.pad).to(trainer.works_on)
        learned = trainer.summed(batch.learned)
        nll = token_losses(engine, batch).sum()
        engine.backward(nll * (ranks / learned))
        trainer.step(lambda: trainer.clip(train.clip))
        tokens += batch.tokens
    return float(trainer.summed(tokens))


def loaded(rank: int, model: Model, zero: Zero) -> tuple[float, float] | None:
    """The most MB that loading a model adds to a process, and MB of its shard with the largest tensor.

    The shard is the whole model in stages 1 and 2. Pages of the mapped file do not count: they can be evicted.
    """
    from engine.models.deepspeed_model import zero_model
    from engine.models.trainable import shape_of

    heap.give_back()
    if "RssAnon" not in memory():
        return None
    with sampled(lambda: memory()["RssAnon"], 0.002) as held:  # pages of the mapped file can be evicted
        network = zero_model(model, zero, 0, rank)
    sizes = {name: int(np.prod(shape_of(p))) * p.element_size() for name, p in network.named_parameters()}
    shard = sum(sizes.values()) / (zero.ranks if zero.stage == 3 else 1)
    return max(held) - held[0], (shard + max(sizes.values())) / 2**20
