"""What `fedpost bench zero` measures within bare processes, without Ray: resets, a bare loop, and loading."""

import gc
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from datasets_partition.store.tokens import Tokens
from engine.config.sections import Model, Zero
from engine.config.train import Train
from engine.models.base_model import always_the_same_bits
from engine.objectives.token_batch import token_losses
from engine.system import allocator as heap
from engine.system.rendezvous import meet
from engine.training.step_loop import Training, batches
from experiments.bench.harness import seconds_of
from experiments.bench.sampling import sampled
from experiments.config.recipe import Recipe
from experiments.preflight.processes import memory
from strategies.core.seeds import rng, torch_seed

LOOPBACK = "127.0.0.1"
RESETS = 7


@dataclass(frozen=True)
class Work:
    """A recipe, its rows, the clients of its first round, and how often the bare loop repeats one client's steps."""

    recipe: Recipe
    zero: Zero
    tokens: Path
    cohort: list[int]
    tries: int


@dataclass(frozen=True)
class Bare:
    """Seconds of a fresh engine, a reset, a client of the recipe's steps; tokens per second of the bare loop.

    `first_S` is where the first round leads: the mean of bare loops, each in a fresh engine. Legend: S of a shard.
    """

    fresh_s: float
    reset_s: float
    client_s: float
    tokens_per_s: float
    first_S: np.ndarray


def in_ranks(zero: Zero, gpu: bool, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls `work(rank, *arguments)` in a fresh process for each rank of a gang, once they have met.

    With `gpu` each process has a GPU to itself.
    """
    with socket.create_server((LOOPBACK, 0)) as listening:
        port = listening.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(zero.ranks):
        receiver, sender = context.Pipe(duplex=False)
        pipes.append(receiver)
        processes.append(context.Process(target=_rank, args=(rank, zero, gpu, port, sender, work, arguments)))
        processes[-1].start()
        sender.close()
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RuntimeError("a rank ended before it had measured anything: its message stands above") from None
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()


def _rank(
    rank: int, zero: Zero, gpu: bool, port: int, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
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
    sender.send(work(rank, *arguments))
    dist.barrier()


def bare(rank: int, work: Work) -> Bare:
    """Measures one rank's times; all ranks do the same at the same time."""
    from engine.models.deepspeed_model import zero_model
    from engine.training.deepspeed_training import ZeroTrainer

    model, train, seed = work.recipe.model, work.recipe.train, work.recipe.seed
    tokens = Tokens.open(work.tokens)

    def fresh() -> ZeroTrainer:
        network = zero_model(model, work.zero, torch_seed(seed, 0, -1, "initial"), rank)
        return ZeroTrainer(network, 0, model, work.zero, train)

    def stream(client: int) -> np.random.Generator:
        return rng(seed, 0, client, "batches")

    trainer = fresh()  # the first engine also loads libraries: it is not timed
    start_S = trainer.weights()
    total_S, weights, fresh_s = torch.zeros_like(start_S), 0, []
    for client in work.cohort:
        trainer.engine.destroy()
        del trainer
        gc.collect()  # an engine refers to itself
        seconds, trainer = seconds_of(fresh)
        fresh_s += seconds
        rows = tokens.rows(client, "train")
        _bare_loop(trainer, rows, train, stream(client))
        total_S.add_(trainer.weights().sub_(start_S), alpha=rows.num_rows)
        weights += rows.num_rows
    client = work.cohort[0]
    rows = tokens.rows(client, "train")

    def speed() -> float:
        began = time.perf_counter()
        return _bare_loop(trainer, rows, train, stream(client)) / (time.perf_counter() - began)

    speeds = [statistics.median(speed() for _ in range(work.tries))]
    heap.keep(gathered=work.zero.stage == 3)  # as a gang does; the bare loop counts with the faster setting
    speeds.append(statistics.median(speed() for _ in range(work.tries)))

    def reset() -> None:
        trainer.become(start_S)
        trainer.summed(0.0)  # waits for a GPU

    reset_s, _ = seconds_of(reset, RESETS)
    client_s, _ = seconds_of(lambda: trainer.train([Training(rows, start_S, stream(client), 0)], train), work.tries)
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
    from engine.models.deepspeed_model import shape_of, zero_model

    heap.give_back()
    if "RssAnon" not in memory():
        return None
    with sampled(lambda: memory()["RssAnon"], 0.002) as held:
        network = zero_model(model, zero, 0, rank)
    sizes = {name: int(np.prod(shape_of(p))) * p.element_size() for name, p in network.named_parameters()}
    shard = sum(sizes.values()) / (zero.ranks if zero.stage == 3 else 1)
    return max(held) - held[0], (shard + max(sizes.values())) / 2**20
