"""The bare loop that the engine is measured against: processes of one thread, a plain model, fused optimizers, no Ray.

It trains the same clients on the same batches and averages as the engine does, on code of its own where the engine's
could hide a fault: PEFT's model as it is, one tensor after another, a plain float64 sum.
"""

import multiprocessing
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import experiments
from datasets_partition.store import Store
from datasets_partition.tokens import Tokens
from engine.batches import batches
from engine.checkpoint import load_checkpoint
from engine.model import lora_config
from engine.objectives.sft import Sft
from engine.optimizers import make_optimizer
from engine.rows import token_columns
from engine.settings import Lora
from experiments.api import build_store
from experiments.config import Recipe, located
from strategies.seeds import rng, torch_seed
from strategies.types import ServerState

PROCESSES = 2
TOLERANCE = 2e-5  # of the vector after a round: one flat tensor and many round differently, and AdamW amplifies it
_bare: dict[str, Any] = {}


@dataclass(frozen=True)
class Compared:
    """Seconds of each round, of the engine and of the bare loop, tokens of a round, and how far vectors are apart."""

    engine_s: list[float]
    bare_s: list[float]
    tokens: float
    apart: float

    @property
    def ratio(self) -> float:
        """How many times the bare loop's speed the engine has: medians, without the first round."""
        return statistics.median(self.bare_s[1:]) / statistics.median(self.engine_s[1:])


def compare(work: Recipe, folder: Path) -> Compared:
    """Both loops' rounds; ValueError where they do not have the same vector after the first."""
    run = experiments.run(work, out=folder)
    rows = [row for row in run.metrics.to_pylist() if row["client"] is None]
    seconds = [row["value"] for row in rows if row["name"] == "round_s"]
    tokens = [row["value"] for row in rows if row["name"] == "tokens" and row["split"] == "train"]
    first = load_checkpoint(run.folder / "checkpoints", 1)
    bare, vector = bare_loop(work, build_store(work))
    assert first is not None and isinstance(first.state, ServerState)
    apart = gate(first.state.params, vector)
    return Compared(seconds, bare, statistics.mean(tokens), apart)


def gate(engine: torch.Tensor, bare: np.ndarray) -> float:
    """How far apart both vectors (P,) are after the first round; ValueError where that is more than rounding."""
    apart = float((engine - torch.from_numpy(bare)).abs().max())
    if not apart <= TOLERANCE:
        raise ValueError(f"after the first round the engine's and the bare loop's vectors are {apart:.2g} apart")
    return apart


def bare_loop(work: Recipe, store: Path) -> tuple[list[float], np.ndarray]:
    """Seconds of each round, and the vector after the first."""
    tokens = token_columns(store, located(work))
    clients = Store.open(store).num_training
    seconds: list[float] = []
    after_first = np.zeros(0)
    with multiprocessing.get_context("spawn").Pool(PROCESSES, _start, (work, tokens)) as pool:
        vector: np.ndarray = pool.apply(_initial)
        for round_ in range(work.rounds):
            began = time.perf_counter()
            cohort = work.cohort.sample(clients, work.seed, round_).tolist()
            jobs = [(vector, round_, cohort[part::PROCESSES]) for part in range(PROCESSES)]
            totals, weights = zip(*pool.map(_train, jobs, chunksize=1), strict=True)
            vector = vector + (np.sum(totals, 0) / sum(weights)).astype(np.float32)
            seconds.append(time.perf_counter() - began)
            after_first = vector if round_ == 0 else after_first
        pool.close()
        pool.join()
    return seconds, after_first


def _start(work: Recipe, tokens: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    network = AutoModelForCausalLM.from_pretrained(work.model.base)
    torch.manual_seed(torch_seed(work.seed, 0, -1, "initial"))
    if isinstance(work.model.peft, Lora):
        network = get_peft_model(network.requires_grad_(False), lora_config(work.model))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    _bare.update(work=work, tokens=Tokens.open(tokens), network=network.train(), trained=trained)


def _initial() -> np.ndarray:
    vector: np.ndarray = torch.cat([parameter.detach().reshape(-1) for parameter in _bare["trained"]]).numpy()
    return vector


def _train(job: tuple[np.ndarray, int, list[int]]) -> tuple[np.ndarray, float]:
    """Trains some clients of a round: the sum of weight * delta, and of weights."""
    vector, round_, clients = job
    work, network, trained = _bare["work"], _bare["network"], _bare["trained"]
    train, objective = work.train, Sft(work.train.max_length)
    largest = int(_bare["tokens"].counts("train").max())
    total, weights = np.zeros(len(vector)), 0.0
    for client in clients:
        rows = _bare["tokens"].rows(client, "train")
        torch.nn.utils.vector_to_parameters(torch.from_numpy(vector.copy()), trained)  # they become views of it
        optimizer = make_optimizer(trained, train.optimizer)
        for picked in batches(rows.num_rows, train, rng(work.seed, round_, client, "batches")):
            nll, learnt = objective.loss(network, objective.collate(rows.take(picked), 0))
            (nll / learnt).backward()
            torch.nn.utils.clip_grad_norm_(trained, train.clip)
            optimizer.step()
            optimizer.zero_grad()
        weight = rows.num_rows / largest
        delta = torch.nn.utils.parameters_to_vector(trained).detach().numpy() - vector
        total, weights = total + weight * delta.astype(np.float64), weights + weight
    return total, weights
