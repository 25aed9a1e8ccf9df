"""How many clients a pack should train at once: measured on the recipe's own clients for a few seconds."""

import time
from dataclasses import replace

import numpy as np
import psutil
import torch

from datasets_partition.store.tokens import Tokens
from engine.config.train import Train
from engine.system import allocator as heap
from engine.training.lanes import PackTrainer
from engine.training.local_training import LocalTrainer, Training

SECONDS = 6.0  # for all sizes together
STEPS = 2
GAIN = 1.03  # less is noise, and a larger pack takes memory
SPARE = 0.5  # of the free memory is left for what else there is


def best_pack(
    trainer: LocalTrainer,
    tokens: Tokens,
    clients: int,
    most: int,
    neighbours: int,
    start: torch.Tensor,
    train: Train,
) -> int:
    """The number of lanes, 1, 2, 4, ... up to `most`, that trains the most tokens a second from `start` (P,).

    The smallest of those that are about as fast. None is tried whose memory might not be there for all `neighbours`; 1
    where the model does not pack at all.
    """
    began, short = time.monotonic(), replace(train, steps=STEPS, epochs=None)
    held, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    best, speed, lanes = 1, _speed(trainer, tokens, clients, 1, start, short), 2
    while lanes <= most and time.monotonic() - began < SECONDS:
        heap.forget_most()
        try:
            reached = _speed(PackTrainer(trainer, lanes, train), tokens, clients, lanes, start, short)
        except (torch.OutOfMemoryError, ValueError):
            break
        if reached > GAIN * speed:
            best, speed = lanes, reached
        elif lanes >= 4 * best:
            break
        if 2 * neighbours * (heap.most_held() - held) > SPARE * free or _half_full(trainer.device):
            break
        lanes *= 2
    return best


def _half_full(device: torch.device) -> bool:
    """Whether twice as much would not fit this process's share of a GPU."""
    if device.type != "cuda":
        return False
    share = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_allocated(device) > share / 2


def _speed(trainer: LocalTrainer, tokens: Tokens, clients: int, lanes: int, start: torch.Tensor, train: Train) -> float:
    """Tokens a second of so many clients at once, after a first step that loads what is loaded once."""
    chosen = np.linspace(0, clients - 1, max(2, lanes)).astype(int).tolist()

    def trainings() -> list[Training]:
        rows = [tokens.rows(client, "train") for client in chosen]
        return [Training(own, start, np.random.default_rng(0), 0, None, None, 1.0, None, None) for own in rows]

    trainer.train(trainings(), replace(train, steps=1))
    began = time.monotonic()
    done = trainer.train(trainings(), train)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return sum(one.metrics["tokens"] for one in done) / (time.monotonic() - began)
