"""What `fedpost bench zero` measures within two bare processes, without Ray: resets, a bare loop, and loading."""

import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from datasets_partition.tokens import Tokens
from engine import heap
from engine.batches import batches
from engine.objectives.sft import Sft
from engine.settings import Model, Zero
from engine.train_settings import Train
from experiments.bench.results import memory
from strategies.seeds import rng

TIMEOUT = timedelta(seconds=300)
RESETS = 7


@dataclass(frozen=True)
class Work:
    """A model, its training, the rows of one client, and how often the bare loop goes over its steps."""

    model: Model
    train: Train
    zero: Zero
    tokens: Path
    client: int
    tries: int


@dataclass(frozen=True)
class Bare:
    """Seconds: a fresh engine, a reset, a client of the recipe's steps; and tokens per second of a bare loop.

    `apart` is the largest difference between the weights that both loops lead to.
    """

    fresh_s: float
    reset_s: float
    client_s: float
    tokens_per_s: float
    apart: float


def in_ranks(zero: Zero, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` gives in each of as many fresh processes as a gang has ranks, which have met."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(zero.ranks):
        receiver, sender = context.Pipe(duplex=False)
        pipes.append(receiver)
        processes.append(context.Process(target=_rank, args=(rank, zero.ranks, port, sender, work, arguments)))
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


def _rank(rank: int, ranks: int, port: int, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    import deepspeed

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=TIMEOUT)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    sender.send(work(rank, *arguments))
    dist.barrier()


def bare(rank: int, work: Work) -> Bare:
    """A rank's times; all ranks do the same."""
    from engine.zero import ZeroTrainer
    from engine.zero_model import zero_model

    rows = Tokens.open(work.tokens).rows(work.client, "train")
    objective, began = Sft(work.train.max_length), time.perf_counter()

    def fresh() -> ZeroTrainer:
        network = zero_model(work.model, work.zero, 0, rank)
        return ZeroTrainer(network, objective, 0, work.model, work.zero, work.train)

    trainer = fresh()
    fresh_s = time.perf_counter() - began
    start = trainer.weights()
    trainer.steps(rows, start, work.train, rng(0, 0, 0, "batches"))  # what loads at first use is no part of a step
    resets, clients, speeds = [], [], []
    for _ in range(RESETS):
        began = time.perf_counter()
        trainer.become(start)
        resets.append(time.perf_counter() - began)
    for _ in range(work.tries):
        began = time.perf_counter()
        trainer.steps(rows, start, work.train, rng(0, 0, 0, "batches"))
        clients.append(time.perf_counter() - began)
    ours = trainer.weights()
    trainer.become(start)
    theirs = start
    for turn in range(work.tries):
        began = time.perf_counter()
        tokens = _bare_loop(trainer, rows, work.train)
        speeds.append(tokens / (time.perf_counter() - began))
        theirs = trainer.weights() if turn == 0 else theirs
    apart = float((ours - theirs).abs().max())
    return Bare(fresh_s, statistics.median(resets), statistics.median(clients), statistics.median(speeds), apart)


def _bare_loop(trainer: Any, rows: Any, train: Train) -> float:
    """Deepspeed's own loop on the same batches, with what every loop must do: forward, backward, clip, step."""
    engine, rank, ranks = trainer.engine, trainer.rank, trainer.ranks
    engine.train()
    trainer.correct, trainer.clip = None, train.clip
    tokens = 0
    for picked in batches(rows.num_rows, train, rng(0, 0, 0, "batches")):
        batch = trainer.objective.collate(rows.take(picked[rank::ranks]), trainer.pad)
        learnt = torch.tensor(float(batch.learnt))
        dist.all_reduce(learnt)
        nll, _ = trainer.objective.loss(engine, batch)
        engine.backward(nll * (ranks / learnt.item()))
        engine.step()
        tokens += int(batch.attention_BT.sum())
    total = torch.tensor(float(tokens))
    dist.all_reduce(total)
    return total.item()


def loaded(rank: int, model: Model, zero: Zero) -> tuple[float, float] | None:
    """MB by which a process has grown at the most while it loaded a model, and MB of its shard with one tensor more.

    Pages of the mapped file are not counted: they are the system's to take back.
    """
    from engine.zero_model import shape_of, zero_model

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
