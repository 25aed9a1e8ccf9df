"""Rounds of null clients, which train nothing: what remains is the engine's cost.

The slots are the engine's but for their trainer, which returns the same change for each client at once.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.models.base_model import PackedBase
from engine.records.metrics import Logs
from engine.rounds.round_loop import RunParts, round_loop
from engine.rounds.server import DriverShards
from engine.scheduling.pool import Pool
from engine.training.local_training import Job, LocalTrainer
from engine.workers.worker import ClientActor
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench, largest_difference
from experiments.bench.sampling import stored_bytes
from experiments.config.recipe import Recipe, located
from experiments.preflight.processes import memory
from experiments.runs.api import build_store, ray_session
from strategies.core.layout import Layout
from strategies.core.protocol import ClientState, Update

CHANGE = 2.0**-7  # on the exact sum's grid: the mean over any number of clients is the same number
FIGURES = {"loss": 1.0, "rows": 1.0, "steps": 1.0, "tokens": 8.0, "learned": 7.0, "rates": 0.0}


class NullTrainer(LocalTrainer):
    """Trains nothing: each client's change is CHANGE everywhere."""

    def updates(
        self, jobs: list[Job], federation: Federation, *, lent: bool = False
    ) -> list[tuple[Update, ClientState]]:
        """Returns the updates of all jobs at once."""
        delta = torch.full((self.trainable.layout.size,), CHANGE)
        return [(Update(job.client, job.weight, delta, metrics=dict(FIGURES)), {}) for job in jobs]


class NullClient(ClientActor):
    """A slot of null clients."""

    def attach(self, packed: PackedBase, base: Any, tokens: Path, first: bool) -> tuple[Layout, np.ndarray]:
        """Attaches as any slot does; then its runner gets a trainer that trains nothing."""
        layout, initial = super().attach(packed, base, tokens, first)
        plain = self.attached.trainer
        null = NullTrainer(plain.trainable, plain.pad, self.federation.train)
        self.attached.runner.trainer_of = lambda unit, message: null
        return layout, initial


class NullPool(Pool):
    """Slots of null clients."""

    client = NullClient


@dataclass(frozen=True)
class NullRounds:
    """Seconds until the first round and of each round, bytes that a round brings into the store, and the driver's MB.

    `parameters` is the size of the vector.
    """

    start_s: float
    seconds: list[float]
    nbytes: float
    parameters: int
    rss_mb: float


def null_recipe(bench: Bench, clients: int, cohort: int, size_mb: float, slots: int = 2) -> Recipe:
    """Clients of one row each, on a model whose adapters take about `size_mb` MB (0: some bytes); writes both."""
    base = bench.folder / f"base-{size_mb:g}"
    if not base.exists():
        width = 64 if size_mb < 1 else 512
        sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
        write_llama(base, {"hidden_size": width, **sizes})
    if not (bench.folder / "rows.parquet").exists():
        write_rows(bench.folder, clients, 1, 8)
    rank = max(1, round(size_mb * 2**20 / 4 / 1024))
    return bench.recipe(
        *("rounds=1", f"clients.slots={slots}", f"cohort.size={cohort}", "train={steps=1, batch=1, max_length=16}"),
        *(f'model.base="{base}"', f'model.peft={{kind="lora", r={rank}, targets=["q_proj"]}}'),
    )


def play(work: Recipe, folder: Path, rounds: int) -> NullRounds:
    """Plays null rounds in this process; ValueError where the model has not moved by exactly CHANGE in each."""
    work = located(work)
    store = build_store(work)
    with ray_session(None):
        began = time.monotonic()
        slots = NullPool.start(work, folder / "client_state", store)
        try:
            opened, tokens = Store.open(store), Tokens.open(slots.columns.folder)
            shards = DriverShards(work, slots, opened.num_training)
            state, logs = shards.initial(), Logs.under(folder)
            first = state.parts[0].params
            loop = round_loop(RunParts(work, slots, shards, state, opened, tokens, folder), logs)
            start_s, seconds, before = time.monotonic() - began, list[float](), stored_bytes()
            for round_ in range(1, rounds + 1):
                began = time.monotonic()
                state, event = loop.play(state)
                logs.flush(round_)
                seconds.append(time.monotonic() - began)
                refuse_other_change(torch.from_numpy(state.parts[0].params - first), round_, event.clients)
            nbytes, rss = (stored_bytes() - before) / rounds, memory().get("VmRSS", 0.0)
        finally:
            slots.stop()
    return NullRounds(start_s, seconds, nbytes, slots.layout.size, rss)


def refuse_other_change(moved: torch.Tensor, round_: int, clients: int) -> None:
    """The gate: the mean of what all clients sent is what each of them sent."""
    what = f"after round {round_} of {clients} null clients the model's change and what each sent"
    largest_difference(what, moved, torch.tensor(round_ * CHANGE), 1e-6)
