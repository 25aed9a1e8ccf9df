"""The bare loop that the engine is measured against: processes of one thread, a plain model, fused optimizers, no Ray.

It trains and averages the same clients on the same batches, with separate code wherever the engine's could hide a
fault: PEFT's model as it is, one tensor after another, a plain float32 sum. The processes share the vector and the
sums in memory. On a GPU it is one process, which has the GPU for itself. Legend: P trained parameters, K processes.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import experiments
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.messages.events import Event, RoundDone, RunDone
from engine.models.adapters import peft_config
from engine.records.checkpoint import load_checkpoint
from engine.system.allocator import use_large_pages
from engine.training.optimizers import make_optimizer
from engine.training.step_loop import batches
from engine.workers.token_columns import token_columns
from experiments.bench.bare_losses import Step, step_loss
from experiments.bench.harness import largest_difference, metric, seconds_of
from experiments.config.recipe import Recipe, located
from experiments.runs.api import build_store
from strategies.core.seeds import rng, sample_key, torch_seed

PROCESSES = 2
TOLERANCE = 2e-5  # of the vector after a round: one flat tensor and many round differently, and AdamW amplifies it
_process: dict[str, Any] = {}  # what each process of the loop holds


class Compared(NamedTuple):
    """The seconds of all rounds of both loops, and how far their vectors are apart after the first round."""

    engine_s: list[float]
    bare_s: list[float]
    tokens: float  # of a mean round
    apart: float  # the largest difference
    share: float  # the norm of the difference over that of the change

    @property
    def ratio(self) -> float:
        """The engine's speed over the bare loop's: the median of the rounds but the first."""
        return statistics.median(bare / engine for engine, bare in zip(self.engine_s[1:], self.bare_s[1:], strict=True))

    @property
    def best_round_s(self) -> float:
        """Seconds of the engine's fastest round but the first."""
        return min(self.engine_s[1:])


def compare(work: Recipe, folder: Path, tolerance: float = TOLERANCE) -> Compared:
    """Plays both loops' rounds in turn; ValueError if the vectors are over `tolerance` apart after the first round."""
    seconds = list[float]()  # of the bare loop; taking turns, both find the machine in the same state
    with bare_loop(work, build_store(work)) as (vector_P, play):
        start_P, bare_P = vector_P.clone(), vector_P.clone()

        def follow(event: Event) -> None:
            if isinstance(event, RoundDone) and event.round < work.rounds:
                # The driver goes on to its next event, which says that the checkpoint is written, and no further.
                while not (folder / "checkpoints" / f"{event.round:05d}").exists():
                    time.sleep(0.005)
            elif not isinstance(event, RunDone):
                return
            seconds.append(play(len(seconds)))
            if len(seconds) == 1:
                bare_P.copy_(vector_P)

        run = experiments.run(work, out=folder, on_event=follow)
    engine_P = after_first_round(run.folder)
    what = "after the first round the engine's and the bare loop's vectors"
    apart = largest_difference(what, engine_P, bare_P, tolerance)
    share = float((engine_P - bare_P).norm() / (bare_P - start_P).norm())
    return Compared(metric(run, "round_s"), seconds, statistics.mean(metric(run, "tokens", "train")), apart, share)


def after_first_round(folder: Path) -> torch.Tensor:
    """The trained parameters of a run after its first round; a gang's ranks have a shard each."""
    saved = load_checkpoint(folder / "checkpoints", 1)
    assert saved is not None
    return torch.cat([shard.params for shard in saved.state.shards])


@contextmanager
def bare_loop(work: Recipe, store: Path) -> Iterator[tuple[torch.Tensor, Callable[[int], float]]]:
    """Yields the loop's vector (P,), and a function that plays a round by its number and returns its seconds."""
    tokens = token_columns(store, located(work))
    clients, processes = Store.open(store).num_training, 1 if work.clients.num_gpus else PROCESSES
    vector_P = torch.nn.utils.parameters_to_vector(_trained(_network(work))).detach().share_memory_()
    totals_KP = torch.zeros(processes, len(vector_P)).share_memory_()
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (work, tokens, vector_P, totals_KP)) as pool:

        def play(round_: int) -> None:
            cohort = work.cohort.sample(clients, work.seed, round_).tolist()
            jobs = [(round_, number, cohort[number::processes]) for number in range(processes)]
            weight = sum(pool.map(_train, jobs))
            for total_P in totals_KP:
                vector_P.add_(total_P, alpha=1 / weight)

        yield vector_P, lambda round_: seconds_of(lambda: play(round_))[0][0]


def _network(work: Recipe) -> Any:
    """The model as its users make it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, at each change of mode
    network = AutoModelForCausalLM.from_pretrained(work.model.base, dtype=getattr(torch, work.model.dtype))
    torch.manual_seed(torch_seed(work.seed, 0, -1, "initial"))
    if work.model.peft.peft_class is not None:
        network = get_peft_model(network.requires_grad_(False), peft_config(work.model))
    return network.train()


def _trained(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _start(work: Recipe, tokens: Path, vector_P: torch.Tensor, totals_KP: torch.Tensor) -> None:
    from transformers import AutoTokenizer

    use_large_pages()
    torch.set_num_threads(1)
    device = torch.device("cuda" if work.clients.num_gpus else "cpu")
    network, local_P = _network(work).to(device), vector_P.to(device, copy=True)
    torch.nn.utils.vector_to_parameters(local_P, _trained(network))  # the parameters become views of it
    _process.update(work=work, tokens=Tokens.open(tokens), network=network, vector_P=vector_P, local_P=local_P)
    _process.update(totals_KP=totals_KP, tokenizer=AutoTokenizer.from_pretrained(work.model.base))


def _train(job: tuple[int, int, list[int]]) -> float:
    """Trains some clients of a round, sums weight * delta in their row of the totals, and returns the weights' sum."""
    round_, number, clients = job
    work, network, tokens, tokenizer = (_process[name] for name in ("work", "network", "tokens", "tokenizer"))
    vector_P, local_P, total_P = _process["vector_P"], _process["local_P"], _process["totals_KP"][number].zero_()
    train, trained, largest, weights = work.train, _trained(network), int(tokens.counts("train").max()), 0.0
    for client in clients:
        rows = tokens.rows(client, "train")
        local_P.copy_(vector_P)
        optimizer = make_optimizer(trained, train.optimizer)
        drawn = batches(rows.num_rows, train, rng(work.seed, round_, client, "batches"))
        for number, picked in enumerate(drawn):
            key = partial(sample_key, work.seed, round_, client, number)
            step = Step(rows.take(picked), picked.tolist(), key)
            step_loss(network, tokenizer, train.objective, step).backward()
            torch.nn.utils.clip_grad_norm_(trained, train.clip)
            optimizer.step()
            optimizer.zero_grad()
        weight = rows.num_rows / largest
        total_P.add_(local_P.cpu().sub_(vector_P), alpha=weight)
        weights += weight
    return weights
