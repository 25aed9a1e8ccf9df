"""The bare loop that the engine is measured against: processes of one thread, a plain model, fused optimizers, no Ray.

It trains the same clients on the same batches and averages as the engine does, on code of its own where the engine's
could hide a fault: PEFT's model as it is, one tensor after another, a plain float32 sum. The processes share the
vector and the sums, and work on both in place. Slots on a GPU are measured against one process that has it for itself.
Legend: P trained parameters, K processes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import experiments
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.sections import Lora
from engine.messages.events import Event, Finished, RoundDone
from engine.models.adapters import lora_config
from engine.objectives.token_batch import token_losses
from engine.records.checkpoint import load_checkpoint
from engine.system.allocator import use_large_pages
from engine.training.batching import batches
from engine.training.optimizers import make_optimizer
from engine.workers.token_columns import token_columns
from experiments.config.recipe import Recipe, located
from experiments.runs.api import build_store
from strategies.core.seeds import rng, torch_seed

PROCESSES = 2
TOLERANCE = 2e-5  # of the vector after a round: one flat tensor and many round differently, and AdamW amplifies it
LOOK_S = 0.005
_bare: dict[str, Any] = {}


@dataclass(frozen=True)
class Compared:
    """Seconds of each round, of the engine and of the bare loop, tokens of a round, and how far vectors are apart.

    `apart` is the largest difference after the first round, `share` the difference's norm over that of the change.
    """

    engine_s: list[float]
    bare_s: list[float]
    tokens: float
    apart: float
    share: float

    @property
    def ratio(self) -> float:
        """How many times the bare loop's speed the engine has: the median of the rounds but the first.

        A round of one came right after the same round of the other, so that both had the machine as it was then.
        """
        return statistics.median(bare / own for own, bare in zip(self.engine_s[1:], self.bare_s[1:], strict=True))


def compare(work: Recipe, folder: Path, tolerance: float = TOLERANCE) -> Compared:
    """Both loops' rounds by turns; ValueError where the vectors are further apart than `tolerance` after the first."""
    states, seconds = [torch.empty(0)], list[float]()
    with bare_loop(work, build_store(work)) as (vector_P, play):
        start_P = vector_P.clone()

        def follow(event: Event) -> None:
            if isinstance(event, RoundDone) and event.round < work.rounds:
                # The driver goes on to its next event, which is that it has written this, and no further.
                while not (folder / "checkpoints" / f"{event.round:05d}").exists():
                    time.sleep(LOOK_S)
            elif not isinstance(event, Finished):
                return
            seconds.append(play(len(seconds)))
            if len(seconds) == 1:
                states[0] = vector_P.clone()

        run = experiments.run(work, out=folder, on_event=follow)
    rows = [row for row in run.metrics.to_pylist() if row["client"] is None]
    engine_s = [row["value"] for row in rows if row["name"] == "round_s"]
    tokens = [row["value"] for row in rows if row["name"] == "tokens" and row["split"] == "train"]
    first = load_checkpoint(run.folder / "checkpoints", 1)
    assert first is not None
    (bare_P,), first_P = states, first.state.parts[0].params
    apart = gate(first_P, bare_P, tolerance)
    share = float((first_P - bare_P).norm() / (bare_P - start_P).norm())
    return Compared(engine_s, seconds, statistics.mean(tokens), apart, share)


def gate(engine_P: torch.Tensor, bare_P: torch.Tensor, tolerance: float = TOLERANCE) -> float:
    """How far apart both vectors are after the first round; ValueError where that is more than `tolerance`."""
    apart = float((engine_P - bare_P).abs().max())
    if not apart <= tolerance:
        raise ValueError(f"after the first round the engine's and the bare loop's vectors are {apart:.2g} apart")
    return apart


@contextmanager
def bare_loop(work: Recipe, store: Path) -> Iterator[tuple[torch.Tensor, Callable[[int], float]]]:
    """The loop's vector (P,), and what plays a round by its number and says how many seconds it took."""
    tokens = token_columns(store, located(work))
    clients, processes = Store.open(store).num_training, 1 if work.clients.num_gpus else PROCESSES
    vector_P = torch.nn.utils.parameters_to_vector(_trained(_network(work))).detach().share_memory_()
    totals_KP = torch.zeros(processes, len(vector_P)).share_memory_()
    given = (work, tokens, vector_P, totals_KP)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, given) as pool:  # which ends when one of its processes does

        def play(round_: int) -> float:
            began = time.perf_counter()
            cohort = work.cohort.sample(clients, work.seed, round_).tolist()
            jobs = [(round_, part, cohort[part::processes]) for part in range(processes)]
            weight = sum(pool.map(_train, jobs))
            for total_P in totals_KP:
                vector_P.add_(total_P, alpha=1 / weight)
            return time.perf_counter() - began

        pool.submit(_ready).result()
        yield vector_P, play


def _network(work: Recipe) -> Any:
    """The model as its users make it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(work.model.base, dtype=getattr(torch, work.model.dtype))
    torch.manual_seed(torch_seed(work.seed, 0, -1, "initial"))
    if isinstance(work.model.peft, Lora):
        network = get_peft_model(network.requires_grad_(False), lora_config(work.model))
    return network.train()


def _trained(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _start(work: Recipe, tokens: Path, vector_P: torch.Tensor, totals_KP: torch.Tensor) -> None:
    use_large_pages()
    torch.set_num_threads(1)
    device = torch.device("cuda" if work.clients.num_gpus else "cpu")
    network = _network(work).to(device)
    trained = _trained(network)
    own_P = vector_P.to(device, copy=True)
    torch.nn.utils.vector_to_parameters(own_P, trained)  # they become views of it
    _bare.update(work=work, tokens=Tokens.open(tokens), network=network, trained=trained)
    _bare.update(vector_P=vector_P, own_P=own_P, totals_KP=totals_KP)


def _ready() -> bool:
    return bool(_bare)


def _train(job: tuple[int, int, list[int]]) -> float:
    """Trains some clients of a round: the sum of weight * delta is in their part of the totals; that of weights."""
    round_, part, clients = job
    work, network, trained = _bare["work"], _bare["network"], _bare["trained"]
    vector_P, own_P, total_P = _bare["vector_P"], _bare["own_P"], _bare["totals_KP"][part].zero_()
    train, objective = work.train, work.train.objective
    largest, weights = int(_bare["tokens"].counts("train").max()), 0.0
    for client in clients:
        rows = _bare["tokens"].rows(client, "train")
        own_P.copy_(vector_P)
        optimizer = make_optimizer(trained, train.optimizer)
        for picked in batches(rows.num_rows, train, rng(work.seed, round_, client, "batches")):
            batch = objective.collate(rows.take(picked), 0).to(own_P.device)
            (token_losses(network, batch).sum() / batch.learnt).backward()
            torch.nn.utils.clip_grad_norm_(trained, train.clip)
            optimizer.step()
            optimizer.zero_grad()
        weight = rows.num_rows / largest
        total_P.add_(own_P.cpu().sub_(vector_P), alpha=weight)
        weights += weight
    return weights
