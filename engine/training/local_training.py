"""A client's local training, free of Ray: from the global vector to an update. Legend: P parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.config.federation import Federation
from engine.config.train import Train
from engine.models.base_model import Trainable
from engine.objectives import Objectives
from engine.objectives.sft import Batch, lengths
from engine.records.client_state import OPTIMIZER, STRATEGY, named, part
from engine.training.batching import batches, pieces, steps_of
from engine.training.optimizers import clip, kept, make_optimizer, restore
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Mask, Strategy, Update, Vector
from strategies.core.seeds import rng, seed_torch, torch_seed

Correct = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Job:
    """A client's part of a round: its encoded rows, its weight in the sum, what it receives, and what it remembers."""

    client: int
    rows: pa.RecordBatch
    weight: float
    got: Broadcast
    memory: ClientState


@dataclass(frozen=True)
class Training:
    """One local training from the vector `start` (P,): what its `client` does of it is the same in any company.

    `moments` are the optimizer's state that it goes on with, None: from nothing. `rate` is a factor on all learning
    rates, `dropout` the seed of what torch draws. Its end is told as a copy; or as what it is `less` another vector,
    perhaps in the trainer's own memory until the next training. Example-level privacy counts what is `live`; None: all.
    """

    rows: pa.RecordBatch
    start: Vector
    stream: np.random.Generator
    dropout: int
    rank: int | None
    correct: Correct | None
    rate: float
    moments: ClientState | None
    less: Vector | None
    live: Mask | None = None


@dataclass(frozen=True)
class Trained:
    """Where a training has led: the vector (P,), its metrics, and the optimizer's state if it is kept."""

    end: Vector
    metrics: dict[str, float]
    moments: ClientState


class Trainer(ABC):
    """One model and one optimizer that become client after client; of a gang's rank, vectors are its shards."""

    optimizer: torch.optim.Optimizer

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the vector lies."""

    @abstractmethod
    def weights(self, less: Vector | None = None) -> Vector:
        """A copy of the present vector (P,); or what it is `less` another, perhaps in its place."""

    @abstractmethod
    def set_rank(self, rank: int | None) -> None:
        """Becomes a client whose adapters have this rank; None: as the recipe says."""

    @abstractmethod
    def steps(
        self,
        rows: pa.RecordBatch,
        start: torch.Tensor,
        train: Train,
        stream: np.random.Generator,
        correct: Correct | None = None,
        rate: float = 1.0,
    ) -> dict[str, float]:
        """Local optimizer steps from the vector `start` (P,), which stay in the model; returns the metrics.

        `correct` may change the gradient of each step, `rate` is a factor on all learning rates.
        """

    @abstractmethod
    def mean_loss(self, rows: pa.RecordBatch, vector: torch.Tensor, batch: int) -> float:
        """The mean loss of the vector (P,) over all of a client's encoded rows, in nats per token."""

    def train(self, trainings: list[Training], train: Train) -> list[Trained]:
        """Does one training after the other."""
        done = []
        for one in trainings:
            self.set_rank(one.rank)
            seed_torch(one.dropout)
            restore(self.optimizer, one.moments or {})
            metrics = self.steps(one.rows, one.start, train, one.stream, one.correct, one.rate)
            moments = {} if one.moments is None else kept(self.optimizer)
            done.append(Trained(self.weights(one.less), metrics, moments))
        return done

    def updates(
        self, jobs: list[Job], federation: Federation, *, lent: bool = False
    ) -> list[tuple[Update, ClientState]]:
        """Trains the clients, and returns of each what its strategy makes of it, and its memory.

        With `lent`, the update of a job may lie in the trainer's own memory: it lasts until the next call.
        Metrics: `loss` in nats is the mean over the `learnt` tokens, each judged before its step; `tokens` counts
        prompts too, `rows` the client's rows, `steps` the optimizer's steps, `rates` their learning rates' sum.
        """
        sent = [job.got for job in jobs]  # which the rule's last part works with, on the CPU
        there = {id(got.params): _on(self.device, got) for got in sent}  # a pack's clients receive the same
        jobs = [replace(job, got=replace(there[id(job.got.params)], rank=job.got.rank)) for job in jobs]
        ends, metrics, moments = ([dict[str, Any]() for _ in jobs] for _ in range(3))
        if federation.strategy.loss_before:
            for job, found in zip(jobs, metrics, strict=True):
                self.set_rank(job.got.rank)
                found["loss_before"] = self.mean_loss(job.rows, job.got.params, federation.train.batch)
        trainings = [self._trainings(job, federation, lent=lent) for job in jobs]
        for run in dict.fromkeys(run for own in trainings for run in own):
            members = [place for place, own in enumerate(trainings) if run in own]
            done = self.train([trainings[place][run] for place in members], federation.train)
            for place, trained in zip(members, done, strict=True):
                told = run != GLOBAL or trainings[place][run].less is not None
                ends[place][run] = trained.end if told else trained.end.sub_(jobs[place].got.params)
                moments[place] |= named(trained.moments, f"{OPTIMIZER}{run}.")
                if run == GLOBAL:
                    metrics[place] |= trained.metrics
        return [self._finished(*one, federation) for one in zip(jobs, sent, ends, metrics, moments, strict=True)]

    def _trainings(self, job: Job, federation: Federation, *, lent: bool) -> dict[str, Training]:
        """All that a client trains in a round, by name."""
        strategy, train, seed, got = federation.strategy, federation.train, federation.seed, job.got
        own = {name: tensor.to(self.device) for name, tensor in part(job.memory, STRATEGY).items()}
        starts = strategy.starts(got, own)
        less = got.params if lent and len(starts) == 1 else None
        by_row = federation.privacy.dp.kind == "example"
        return {
            run: Training(
                job.rows,
                start,
                rng(seed, got.round, job.client, "batches" if run == GLOBAL else "personal"),
                torch_seed(seed, got.round, job.client, "dropout"),
                got.rank,
                _corrected_by(strategy, got, own, run),
                train.over_rounds.factor(got.round, federation.rounds),
                part(job.memory, f"{OPTIMIZER}{run}.") if train.state == "keep" else None,
                less,
                strategy.trained(got, own, run) if by_row else None,
            )
            for run, start in starts.items()
        }

    @staticmethod
    def _finished(
        job: Job,
        sent: Broadcast,
        ends: dict[str, Vector],
        metrics: dict[str, float],
        moments: ClientState,
        federation: Federation,
    ) -> tuple[Update, ClientState]:
        on_cpu = {name: end.cpu() for name, end in ends.items()}
        delta = on_cpu.pop(GLOBAL)
        update = Update(job.client, job.weight, delta, metrics=metrics)
        update, own = federation.strategy.finish(update, sent, part(job.memory, STRATEGY), on_cpu)
        return update, named(own, STRATEGY) | moments


@dataclass
class LocalTrainer(Trainer):
    """The whole model in one process."""

    trainable: Trainable
    objective: Objectives
    pad: int
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, trainable: Trainable, objective: Objectives, pad: int, train: Train) -> "LocalTrainer":
        """The optimizer works on the flat vector, which is one tensor to it: fast, and reset by zeroing."""
        return cls(trainable, objective, pad, make_optimizer([trainable.flat], train.optimizer))

    @property
    def device(self) -> torch.device:
        """Where the vector lies."""
        return self.trainable.flat.device

    def weights(self, less: Vector | None = None) -> Vector:
        """A copy of the present vector (P,); or what it is `less` another, in its place: a fresh page is a dear one."""
        flat = self.trainable.flat.detach()
        return flat.clone() if less is None else flat.sub_(less)

    def set_rank(self, rank: int | None) -> None:
        """Becomes a client whose adapters have this rank; None: as the recipe says."""
        self.trainable.set_rank(rank)

    def steps(
        self,
        rows: pa.RecordBatch,
        start: torch.Tensor,
        train: Train,
        stream: np.random.Generator,
        correct: Correct | None = None,
        rate: float = 1.0,
    ) -> dict[str, float]:
        """Local optimizer steps from the vector `start` (P,), left in `trainable.flat`; returns the metrics.

        `correct` may change the gradient of each step, `rate` is a factor on all learning rates.
        """
        flat, grad, network = self.trainable.flat, self.trainable.grad, self.trainable.network
        flat.data.copy_(start)
        if not network.training:  # which looks at each layer
            network.train()
        nll_total = torch.zeros((), dtype=torch.float64, device=flat.device)  # there, so that no step waits for it
        token_total, steps, trained_tokens, rates = 0, 0, 0, 0.0
        total = steps_of(rows.num_rows, train)
        for picked in batches(rows.num_rows, train, stream):
            grad.zero_()
            step = self.cut(rows.take(picked), train.batch)
            learnt = sum(piece.learnt for piece in step)
            for piece in step:
                nll, _ = self.objective.loss(network, piece.to(self.device))
                (nll / learnt).backward()
                nll_total += nll.detach()
                trained_tokens += piece.tokens
            if correct is not None:
                correct(grad[None], flat.data[None])
            clip(grad[None], train.clip)
            lr = train.optimizer.lr * rate * train.over_steps.factor(steps, total)
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            token_total, steps, rates = token_total + learnt, steps + 1, rates + lr
        return {
            "loss": nll_total.item() / token_total,
            "rows": float(rows.num_rows),
            "steps": float(steps),
            "tokens": float(trained_tokens),
            "learnt": float(token_total),
            "rates": rates,
        }

    def mean_loss(self, rows: pa.RecordBatch, vector: torch.Tensor, batch: int) -> float:
        """The mean loss of the vector (P,) over all of a client's encoded rows, in nats per token."""
        self.trainable.flat.data.copy_(vector)
        nll, learnt = self.nll(rows, batch)
        return nll / learnt

    @torch.no_grad()
    def nll(self, rows: pa.RecordBatch, batch: int) -> tuple[float, int]:
        """The summed loss in nats of the present vector over all rows, and over how many tokens."""
        if self.trainable.network.training:
            self.trainable.network.eval()
        nll_total, token_total = 0.0, 0
        for piece in self.cut(rows, batch):
            nll, learnt = self.objective.loss(self.trainable.network, piece.to(self.device))
            nll_total, token_total = nll_total + nll.item(), token_total + learnt
        return nll_total, token_total

    def cut(self, rows: pa.RecordBatch, batch: int) -> list[Batch]:
        """The rows as batches on the CPU, of no more tokens than `batch` rows of the longest kind have."""
        if rows.num_rows <= batch:
            return [self.objective.collate(rows, self.pad)]
        found = pieces(lengths(rows), batch * self.objective.max_length)
        return [self.objective.collate(rows.take(piece), self.pad) for piece in found]


def _corrected_by(strategy: Strategy, got: Broadcast, memory: ClientState, run: str) -> Correct | None:
    """What the rule does to gradients; None where it leaves them as they are, which costs gangs no copies."""
    if not strategy.corrects:
        return None
    return lambda grad_KP, params_KP: strategy.correct(grad_KP, params_KP, got, memory, run)


def _on(device: torch.device | str, got: Broadcast) -> Broadcast:
    extras = {name: extra.to(device) for name, extra in got.extras.items()}
    return replace(got, params=got.params.to(device), extras=extras)
