"""What `fedpost bench zero` measures within two bare processes, without Ray: resets, a bare loop, and loading."""

import gc
import multiprocessing
import os
import socket
import statistics
import threading
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
from engine.training.batching import batches
from engine.training.step_loop import Training
from experiments.config.recipe import Recipe
from experiments.preflight.processes import memory
from strategies.core.seeds import rng, torch_seed

LOOPBACK = "127.0.0.1"
RESETS = 7


@dataclass(frozen=True)
class Work:
    """A recipe, its rows, the clients of its first round, and how often the bare loop goes over the steps of one."""

    recipe: Recipe
    zero: Zero
    tokens: Path
    cohort: list[int]
    tries: int


@dataclass(frozen=True)
class Bare:
    """Seconds of a fresh engine, a reset, a client of the recipe's steps; tokens per second of the bare loop.

    `first_S` is what the first round leads to: the mean of bare loops, each in a fresh engine. Legend: S of a shard.
    """

    fresh_s: float
    reset_s: float
    client_s: float
    tokens_per_s: float
    first_S: np.ndarray


def in_ranks(zero: Zero, gpu: bool, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` gives in each of as many fresh processes as a gang has ranks, which have met.

    With `gpu` each has a GPU to itself.
    """
    with socket.create_server((LOOPBACK, 0)) as found:
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(zero.ranks):
        receiver, sender = context.Pipe(duplex=False)
        pipes.append(receiver)
        processes.append(context.Process(target=_rank, args=(rank, zero, gpu, port, sender, work, arguments)))
        processes[-1].start()
        sender.close()
    try:
        answers = [pipe.recv() for pipe in pipes]
    except EOFError:
        raise ValueError("a rank ended before it had measured anything: its message stands above") from None
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()
    return answers


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
    """A rank's times; all ranks do the same."""
    from engine.models.deepspeed_model import zero_model
    from engine.training.deepspeed_training import ZeroTrainer

    model, train, seed = work.recipe.model, work.recipe.train, work.recipe.seed
    tokens = Tokens.open(work.tokens)

    def fresh() -> ZeroTrainer:
        network = zero_model(model, work.zero, torch_seed(seed, 0, -1, "initial"), rank)
        return ZeroTrainer(network, 0, model, work.zero, train)

    def stream(client: int) -> np.random.Generator:
        return rng(seed, 0, client, "batches")

    trainer = fresh()  # what loads at first use is no part of the time of one more
    start_S = trainer.weights()
    total_S, weights, made = torch.zeros_like(start_S), 0, []
    for client in work.cohort:
        trainer.engine.destroy()
        del trainer
        gc.collect()  # an engine refers to itself
        began = time.perf_counter()
        trainer = fresh()
        made.append(time.perf_counter() - began)
        rows = tokens.rows(client, "train")
        _bare_loop(trainer, rows, train, stream(client))
        total_S.add_(trainer.weights().sub_(start_S), alpha=rows.num_rows)
        weights += rows.num_rows
    client = work.cohort[0]
    rows = tokens.rows(client, "train")

    def speed() -> float:
        began = time.perf_counter()
        trained = _bare_loop(trainer, rows, train, stream(client))
        return trained / (time.perf_counter() - began)

    speeds = [statistics.median(speed() for _ in range(work.tries))]
    heap.keep(gathered=work.zero.stage == 3)  # as a gang does; the bare loop has what is faster for it
    speeds.append(statistics.median(speed() for _ in range(work.tries)))
    resets, clients = [], []
    for _ in range(RESETS):
        began = time.perf_counter()
        trainer.become(start_S)
        trainer.summed(0.0)  # which a GPU has to be waited for
        resets.append(time.perf_counter() - began)
    for _ in range(work.tries):
        began = time.perf_counter()
        trainer.train([Training(rows, start_S, stream(client), 0)], train)
        clients.append(time.perf_counter() - began)
    first_S = start_S.add_(total_S, alpha=1 / weights).cpu().numpy()
    fresh_s, reset_s, client_s = map(statistics.median, (made, resets, clients))
    return Bare(fresh_s, reset_s, client_s, max(speeds), first_S)


def _bare_loop(trainer: Any, rows: Any, train: Train, stream: np.random.Generator) -> float:
    """Deepspeed's own loop on the same batches, with what every loop must do: forward, backward, clip, step."""
    engine, rank, ranks = trainer.engine, trainer.rank, trainer.ranks
    engine.train()
    tokens = 0
    for picked in batches(rows.num_rows, train, stream):
        batch = trainer.objective.collate(rows.take(picked[rank::ranks]), trainer.pad).to(trainer.works_on)
        learnt = trainer.summed(batch.learnt)
        nll = token_losses(engine, batch).sum()
        engine.backward(nll * (ranks / learnt))
        trainer.step(lambda: trainer.clip(train.clip))
        tokens += batch.tokens
    return float(trainer.summed(tokens))


def loaded(rank: int, model: Model, zero: Zero) -> tuple[float, float] | None:
    """MB by which a process has grown at the most while it loaded a model, and MB of its shard and the largest tensor.

    The shard is the whole model in stages 1 and 2. Pages of the mapped file are not counted: they are the system's to
    take back.
    """
    from engine.models.deepspeed_model import shape_of, zero_model

    heap.give_back()
    before = memory().get("RssAnon")
    if before is None:
        return None
    seen, ended = [before], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            seen.append(memory()["RssAnon"])

    watch = threading.Thread(target=look)
    watch.start()
    network = zero_model(model, zero, 0, rank)
    ended.set()
    watch.join()
    sizes = {name: int(np.prod(shape_of(p))) * p.element_size() for name, p in network.named_parameters()}
    ranks = zero.ranks if zero.stage == 3 else 1
    shard = sum(sizes.values()) / ranks
    return max(seen) - before, (shard + max(sizes.values())) / 2**20
