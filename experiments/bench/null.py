"""Rounds of null clients: nothing is trained, and what is left is what the engine itself costs.

The slots are the engine's own but for their trainer, which gives the same change for each client at once.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.messages.events import RoundDone
from engine.messages.tasks import Unit
from engine.messages.wire import WireBroadcast
from engine.records.metrics import Logs
from engine.rounds.assembly import RunParts, round_loop
from engine.rounds.server import DriverShards, Server
from engine.scheduling.slots import Slots
from engine.training.local_training import Job, LocalTrainer
from engine.workers.worker import ClientActor
from experiments.bench.bases import bench_recipe, write_llama, write_rows
from experiments.bench.stored import stored_bytes
from experiments.config.recipe import Recipe, located
from experiments.runs.api import build_store, ray_session
from strategies.core.protocol import Memory, Update

CHANGE = 2.0**-7  # on the exact sum's grid: the mean over any number of clients is the same again
FIGURES = {"loss": 1.0, "rows": 1.0, "steps": 1.0, "tokens": 8.0, "learnt": 7.0, "rates": 0.0}


class NullTrainer(LocalTrainer):
    """Trains nothing: each client's change is CHANGE everywhere."""

    def updates(self, jobs: list[Job], federation: Federation, *, lent: bool = False) -> list[tuple[Update, Memory]]:
        """All at once."""
        delta = torch.full((self.trainable.layout.size,), CHANGE)
        return [(Update(job.client, job.weight, delta, metrics=dict(FIGURES)), {}) for job in jobs]


class NullClient(ClientActor):
    """A slot of null clients."""

    def _trainer(self, pack: Unit, wire: WireBroadcast) -> LocalTrainer:
        plain = self.trainer
        return NullTrainer(plain.trainable, plain.objective, plain.pad, plain.optimizer)


class NullSlots(Slots):
    """Slots of null clients."""

    client = NullClient


@dataclass(frozen=True)
class NullRounds:
    """What was measured: seconds until the first round, then of each, and the bytes that a round brings into the store.

    `parameters` are the vector's size.
    """

    start_s: float
    seconds: list[float]
    nbytes: float
    parameters: int
    rss_mb: float


def null_recipe(folder: Path, clients: int, cohort: int, size_mb: float, slots: int = 2) -> Recipe:
    """Clients of one row each, on a model whose adapters take about `size_mb` MB (0: some bytes)."""
    base = folder / f"base-{size_mb:g}"
    if not base.exists():
        width = 64 if size_mb < 1 else 512
        sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
        write_llama(base, {"hidden_size": width, **sizes})
    rank = max(1, round(size_mb * 2**20 / 4 / 1024))
    if not (folder / "rows.parquet").exists():
        write_rows(folder / "rows.parquet", clients, 1, 8)
    return bench_recipe(
        folder,
        base,
        f"""
        rounds = 1
        clients = {{ slots = {slots} }}
        cohort = {{ size = {cohort} }}
        train = {{ steps = 1, batch = 1, max_length = 16 }}
        [model]
        peft = {{ kind = "lora", r = {rank}, targets = ["q_proj"] }}
        """,
    )


def play(work: Recipe, folder: Path, rounds: int) -> NullRounds:
    """Plays null rounds in this process; ValueError where the model has not moved by exactly as much each round."""
    from experiments.preflight.processes import memory

    work = located(work)
    store = build_store(work)
    with ray_session(None):
        began = time.monotonic()
        slots = NullSlots(work, folder / "memory")
        try:
            start = slots.start(store)
            opened, tokens = Store.open(store), Tokens.open(start.tokens)
            shards = DriverShards(work, start, opened.num_training)
            state, logs = shards.initial(), Logs.under(folder)
            first = state.parts[0].params
            loop = round_loop(
                RunParts(work, slots, Server(shards, slots), state, opened, tokens, start.layout, folder), logs
            )
            start_s, seconds, before = time.monotonic() - began, list[float](), stored_bytes()
            for round_ in range(1, rounds + 1):
                began = time.monotonic()
                state, played = loop.play(state)
                logs.flush(round_)
                seconds.append(time.monotonic() - began)
                _refuse_other(state.parts[0].params - first, round_, played)
            nbytes, rss = (stored_bytes() - before) / rounds, memory().get("VmRSS", 0.0)
        finally:
            slots.stop()
    return NullRounds(start_s, seconds, nbytes, start.layout.size, rss)


def _refuse_other(moved: torch.Tensor, round_: int, played: RoundDone) -> None:
    """The gate: the mean of what all clients sent is what each sent."""
    wrong = float((moved - round_ * CHANGE).abs().max())
    if not wrong <= 1e-6:
        raise ValueError(f"after round {round_} of {played.clients} null clients the model is {wrong:.2g} off")
