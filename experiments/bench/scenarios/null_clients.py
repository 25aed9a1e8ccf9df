"""`fedpost bench overhead` and `population`: rounds of null clients, which train nothing, show the engine's cost."""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.models.base_model import PackedBase
from engine.records.logs import Logs
from engine.rounds.round_loop import RunSetup, round_loop
from engine.rounds.server import DriverServer
from engine.scheduling.pool import Pool
from engine.training.local_training import Job, LocalTrainer
from engine.workers.token_columns import token_columns
from engine.workers.worker import ClientActor
from experiments.bench.harness import Bench, largest_difference, power, write_llama, write_rows
from experiments.bench.sampling import stored_bytes
from experiments.config.recipe import Recipe, located
from experiments.preflight.processes import in_fresh_process, memory
from experiments.runs.api import build_store, ray_session
from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import ClientState, Update

CHANGE = 2.0**-7  # on the exact sum's grid: the mean over any number of clients is the same number
FIGURES = {"loss": 1.0, "rows": 1.0, "steps": 1.0, "tokens": 8.0, "learned": 7.0, "rates": 0.0}
SLOTS = 2
COHORTS = {0: (100, 1_000, 10_000), 4: (100, 1_000, 10_000), 35: (100, 1_000)}  # by MB of an update
SMALL_COHORTS = {0: (1_000,), 4: (100,), 35: (20,)}
COHORT, LARGE_COHORT = 1_000, 10_000  # of `population`


class NullTrainer(LocalTrainer):
    """Trains nothing: each client's change is CHANGE everywhere."""

    def updates(
        self, jobs: list[Job], federation: Federation, *, view: bool = False
    ) -> list[tuple[Update, ClientState]]:
        """Returns the updates of all jobs at once."""
        delta = torch.full((self.trainable.layout.size,), CHANGE)
        return [(Update(job.client, job.weight, delta, metrics=dict(FIGURES)), {}) for job in jobs]


class NullClient(ClientActor):
    """A slot of null clients."""

    def attach(self, packed: PackedBase, base: Any, tokens: Path, first: bool) -> tuple[Layout, np.ndarray]:
        """Attaches as any slot does, and gives its runner a trainer that trains nothing."""
        layout, initial = super().attach(packed, base, tokens, first)
        plain = self.attached.trainer
        null = NullTrainer(plain.trainable, plain.pad, self.federation.train)
        self.attached.runner.trainer_of = lambda unit, message: null
        return layout, initial


class NullPool(Pool):
    """Slots of null clients."""

    client = NullClient


class NullRounds(NamedTuple):
    """Seconds until the first round and of each, bytes that a round adds to the store, the vector's size, driver MB."""

    start_s: float
    seconds: list[float]
    nbytes: float
    parameters: int
    rss_mb: float

    def ms_per_client(self, cohort: int) -> tuple[float, str]:
        """Milliseconds a client in the median round but the first, with their unit."""
        return statistics.median(self.seconds[1:]) / cohort * 1e3, f"ms, in cohorts of {cohort:,}"


def overhead(bench: Bench) -> None:
    """Measures milliseconds a client by the size of its update, and bytes in the object store over P (4 + 8 slots)."""
    cohorts, ratios = SMALL_COHORTS if bench.small else COHORTS, []
    for size_mb, sizes in cohorts.items():
        for cohort in sizes:
            bench.say(f"cohorts of {cohort:,} with updates of {size_mb} MB")
            work = null_recipe(bench, max(map(max, cohorts.values())), cohort, size_mb)
            rounds = 2 if bench.small or size_mb * cohort > 10_000 else 5
            played = play(work, bench.folder / f"run-{size_mb}-{cohort}", rounds)
            ms, unit = played.ms_per_client(cohort)
            bench.add(f"ms_per_client_{size_mb}mb_{cohort}", ms, f"ms, {played.parameters * 4:,} bytes each")
            bench.add(f"ms_per_client_{size_mb}mb", ms, unit)  # the largest cohort's stays
            if size_mb:  # smaller updates are sent inside Ray's messages
                ratios.append(played.nbytes / (played.parameters * (4 + 8 * SLOTS)))
    bench.add("bytes_over_bound", max(ratios), "of P (4 + 8 slots), by Ray's own count, the worst case")


def population(bench: Bench) -> None:
    """Measures the driver's growth and start by the population, with one cohort; and a large cohort of the largest."""
    populations = (1_000, 10_000) if bench.small else (1_000, 10_000, 100_000, 1_000_000)
    works, starts = dict[int, Recipe](), list[NullRounds]()
    for clients in populations:
        smaller = Bench(bench.folder / power(clients), bench.small)
        smaller.folder.mkdir()
        bench.say(f"rows of {clients:,} clients")
        works[clients] = null_recipe(smaller, clients, COHORT, 0)
        token_columns(build_store(works[clients]), located(works[clients]))
    for clients, work in works.items():  # after all stores are built, so that all starts find the same machine
        bench.say(f"a cohort of {COHORT:,} of {clients:,} clients")
        # The fresh process is the driver: the memory of building the store is not in it.
        starts.append(played := in_fresh_process(play, work, bench.folder / f"run-{clients}", 3))
        bench.add(f"start_s_{power(clients)}", played.start_s, "s until the first round")
        bench.add(f"ms_per_client_{power(clients)}", *played.ms_per_client(COHORT))
        bench.add(f"driver_rss_mb_{power(clients)}", played.rss_mb, "MB")
    fewest, *_, most = populations
    if not bench.small:
        bench.say(f"a cohort of {LARGE_COHORT:,} of {most:,} clients")
        large = replace(works[most], cohort=UniformCohort(size=LARGE_COHORT))
        played = in_fresh_process(play, large, bench.folder / "run-large", 3)
        bench.add(f"ms_per_client_cohort_{power(LARGE_COHORT)}", *played.ms_per_client(LARGE_COHORT))
    bench.add("start_s", starts[-1].start_s, f"s until the first round of {most:,} clients")
    bench.add("driver_rss_growth_mb", starts[-1].rss_mb - starts[0].rss_mb, f"MB from {fewest:,} to {most:,} clients")


def null_recipe(bench: Bench, clients: int, cohort: int, size_mb: float) -> Recipe:
    """Clients of one row each, on a model whose adapters take about `size_mb` MB (0: some bytes); writes both."""
    base = bench.folder / f"base-{size_mb:g}"
    if not base.exists():
        write_llama(base, (64, 128, 1, 2) if size_mb < 1 else (512, 1024, 1, 2))
    if not (bench.folder / "rows.parquet").exists():
        write_rows(bench.folder, clients, 1, 8)
    lora_rank = max(1, round(size_mb * 2**20 / 4 / 1024))
    model = f'model={{base="{base}", peft={{kind="lora", r={lora_rank}, targets=["q_proj"]}}}}'
    size = "rounds=1", f"clients.slots={SLOTS}", f"cohort.size={cohort}", "train={steps=1, batch=1, max_length=16}"
    return bench.recipe(*size, model)


def play(work: Recipe, folder: Path, rounds: int) -> NullRounds:
    """Plays null rounds in this process; ValueError if the model has not moved by exactly CHANGE in each."""
    work = located(work)
    store = build_store(work)
    with ray_session(None):
        began = time.monotonic()
        slots = NullPool.start(work, folder / "client_state", store)
        try:
            opened, tokens = Store.open(store), Tokens.open(slots.columns.folder)
            server, logs = DriverServer(work, slots, opened.num_training), Logs.under(folder)
            state = server.initial()
            first = state.shards[0].params
            loop = round_loop(RunSetup(work, slots, server, state, opened, tokens, folder), logs)
            start_s, seconds, before = time.monotonic() - began, list[float](), stored_bytes()
            for round_ in range(1, rounds + 1):
                began = time.monotonic()
                state, event = loop.play(state)
                logs.flush(round_)
                seconds.append(time.monotonic() - began)
                refuse_other_change(torch.from_numpy(state.shards[0].params - first), round_, event.clients)
            nbytes, rss = (stored_bytes() - before) / rounds, memory().get("VmRSS", 0.0)
        finally:
            slots.stop()
    return NullRounds(start_s, seconds, nbytes, slots.layout.size, rss)


def refuse_other_change(moved: torch.Tensor, round_: int, clients: int) -> None:
    """The gate: the mean of what all clients sent is what each of them sent."""
    what = f"after round {round_} of {clients} null clients the model's change and what each sent"
    largest_difference(what, moved, torch.tensor(round_ * CHANGE), 1e-6)
