"""Chooses how many clients train at once in lanes, by a few seconds of trials on the recipe's own clients."""

import time
from dataclasses import replace

import numpy as np
import psutil
import torch

from datasets_partition.store.tokens import Tokens
from engine.config.train import Train
from engine.messages.errors import RunError
from engine.system import allocator as heap
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training

SECONDS = 6.0  # for all trials together
STEPS = 2
GAIN = 1.03  # a smaller gain is noise, and more lanes take more memory
SPARE = 0.5  # share of the free memory that the trials leave


def best_lanes(
    trainer: LocalTrainer,
    tokens: Tokens,
    clients: int,
    most: int,
    neighbors: int,
    start: torch.Tensor,
    train: Train,
) -> int:
    """Returns the number of lanes, 1, 2, 4, ... up to `most`, that trains the most tokens a second from `start` (P,).

    Prefers the smallest of those that are about as fast. Tries none that might exceed the memory of all `neighbors`.
    Returns 1 if lanes cannot train the model.
    """
    began, short = time.monotonic(), replace(train, steps=STEPS, epochs=None)
    held, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    best, best_speed, lanes = 1, _speed(trainer, tokens, clients, 1, start, short), 2
    while lanes <= most and time.monotonic() - began < SECONDS:
        heap.forget_most()
        try:
            speed = _speed(LaneTrainer(trainer, lanes, train), tokens, clients, lanes, start, short)
        except (torch.OutOfMemoryError, RunError):
            break
        if speed > GAIN * best_speed:
            best, best_speed = lanes, speed
        elif lanes >= 4 * best:
            break
        if 2 * neighbors * (heap.most_held() - held) > SPARE * free or _half_full(trainer.device):
            break
        lanes *= 2
    return best


def _half_full(device: torch.device) -> bool:
    """Whether twice the memory would exceed this process's share of a GPU."""
    if device.type != "cuda":
        return False
    share = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_allocated(device) > share / 2


def _speed(
    trainer: LocalTrainer | LaneTrainer,
    tokens: Tokens,
    clients: int,
    lanes: int,
    start: torch.Tensor,
    train: Train,
) -> float:
    """Returns the tokens a second of `lanes` clients at once, after a first step that warms up."""
    chosen = np.linspace(0, clients - 1, max(2, lanes)).astype(int).tolist()

    def trainings() -> list[Training]:
        return [Training(tokens.rows(client, "train"), start, np.random.default_rng(0), 0) for client in chosen]

    trainer.train(trainings(), replace(train, steps=1))
    began = time.monotonic()
    results = trainer.train(trainings(), train)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return sum(trained.metrics["tokens"] for trained in results) / (time.monotonic() - began)
