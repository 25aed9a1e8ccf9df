"""A client's local training, free of Ray: from the broadcast to an update. Legend: P parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa
import torch

from engine.config.federation import Federation
from engine.config.train import Train
from engine.models.trainable import Trainable
from engine.objectives.base import Objective, counted, require_provided, step_loss, term_sums
from engine.objectives.token_batch import Batch, lengths
from engine.records.client_state import OPTIMIZER, STRATEGY, named, part
from engine.training.batching import batches, pieces
from engine.training.optimizers import clip, make_optimizer
from engine.training.step_loop import Correct, Progress, Trained, Training, no_session, take_steps
from strategies.core.base import Rule
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Update, Vector
from strategies.core.seeds import rng, seed_torch, torch_seed


@dataclass(frozen=True)
class Job:
    """A client's part of a round: its encoded rows, its weight in the sum, the broadcast, and its client state."""

    client: int
    rows: pa.RecordBatch
    weight: float
    broadcast: Broadcast
    state: ClientState


class Trainer(Protocol):
    """What `client_updates` needs of a trainer; a gang's rank has shards for vectors."""

    @property
    def device(self) -> torch.device:
        """Where the vector lies."""

    def become(self, vector: Vector, rank: int | None) -> None:
        """Puts the vector (P,) of a client of this LoRA rank into the model; None is the recipe's rank."""

    def loss_terms(self, rows: pa.RecordBatch, batch: int) -> dict[str, tuple[float, int]]:
        """Returns each term's sum and count over all rows, by the vector now in the model."""

    def train(self, trainings: Sequence[Training], train: Train) -> list[Trained]:
        """Does all trainings; returns their results in order."""

    def updates(
        self, jobs: list[Job], federation: Federation, *, lent: bool = False
    ) -> list[tuple[Update, ClientState]]:
        """Trains clients for a round: see `client_updates`."""


def client_updates(
    trainer: Trainer, jobs: list[Job], federation: Federation, *, lent: bool = False
) -> list[tuple[Update, ClientState]]:
    """Trains the clients; returns each one's update, as its strategy finishes it, and its new client state.

    With `lent` the update of a single job may lie in the trainer's memory, where it lasts until the next call. Metrics
    are those of `Progress.metrics`, and `loss_before` if the strategy asks for it.
    """
    sent = [job.broadcast for job in jobs]  # on the CPU, where the strategy finishes updates
    moved = {id(broadcast.params): _on(trainer.device, broadcast) for broadcast in sent}  # lanes share one vector
    received = [replace(moved[id(broadcast.params)], rank=broadcast.rank) for broadcast in sent]
    jobs = [replace(job, broadcast=broadcast) for job, broadcast in zip(jobs, received, strict=True)]
    ends, metrics, moments = ([dict[str, Any]() for _ in jobs] for _ in range(3))
    if federation.strategy.loss_before:
        for job, figures in zip(jobs, metrics, strict=True):
            trainer.become(job.broadcast.params, job.broadcast.rank)
            terms = trainer.loss_terms(job.rows, federation.train.batch)
            figures["loss_before"] = sum(total / count for total, count in terms.values())
    trainings = [_trainings(job, federation, trainer.device, lent=lent) for job in jobs]
    for run in dict.fromkeys(run for by_run in trainings for run in by_run):
        members = [place for place, by_run in enumerate(trainings) if run in by_run]
        results = trainer.train([trainings[place][run] for place in members], federation.train)
        for place, trained in zip(members, results, strict=True):
            whole = run == GLOBAL and trainings[place][run].less is None
            ends[place][run] = trained.end.sub_(jobs[place].broadcast.params) if whole else trained.end
            moments[place] |= named(trained.moments, f"{OPTIMIZER}{run}.")
            if run == GLOBAL:
                metrics[place] |= trained.metrics
    return [_finished(*parts, federation) for parts in zip(jobs, sent, ends, metrics, moments, strict=True)]


def _trainings(job: Job, federation: Federation, device: torch.device, *, lent: bool) -> dict[str, Training]:
    """Makes all trainings of a client in a round, by the strategy's name for each."""
    strategy, train, seed, broadcast = federation.strategy, federation.train, federation.seed, job.broadcast
    state = {name: tensor.to(device) for name, tensor in part(job.state, STRATEGY).items()}
    starts = strategy.starts(broadcast, state)
    by_row = federation.privacy.dp.kind == "example"
    return {
        run: Training(
            job.rows,
            start,
            rng(seed, broadcast.round, job.client, "batches" if run == GLOBAL else "personal"),
            torch_seed(seed, broadcast.round, job.client, "dropout"),
            rank=broadcast.rank,
            correct=_correction(strategy, broadcast, state, run),
            rate=train.over_rounds.factor(broadcast.round, federation.rounds),
            moments=part(job.state, f"{OPTIMIZER}{run}.") if train.state == "keep" else None,
            less=broadcast.params if lent and len(starts) == 1 else None,
            live=strategy.trained(broadcast, state, run) if by_row else None,
        )
        for run, start in starts.items()
    }


def _correction(strategy: Rule, broadcast: Broadcast, state: ClientState, run: str) -> Correct | None:
    """Returns the strategy's correction of gradients; None if it has none, which saves gangs copies."""
    if not strategy.corrects:
        return None
    return lambda grad_KP, params_KP: strategy.correct(grad_KP, params_KP, broadcast, state, run)


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
    update, state = federation.strategy.finish(update, sent, part(job.state, STRATEGY), on_cpu)
    return update, named(state, STRATEGY) | moments


def _on(device: torch.device, broadcast: Broadcast) -> Broadcast:
    extras = {name: extra.to(device) for name, extra in broadcast.extras.items()}
    return replace(broadcast, params=broadcast.params.to(device), extras=extras)


@dataclass
class LocalTrainer:
    """Trains one client at a time, on the whole model in one process. A backend of the step loop, and a Trainer."""

    trainable: Trainable
    objective: Objective
    pad: int
    max_length: int
    optimizer: torch.optim.Optimizer
    lanes = 1
    batches = staticmethod(batches)
    session = staticmethod(no_session)
    summed = staticmethod(float)  # there is one rank
    train = take_steps
    updates = client_updates

    @classmethod
    def of(cls, trainable: Trainable, pad: int, train: Train) -> "LocalTrainer":
        """Makes a trainer with the recipe's optimizer, which sees the flat vector as one tensor and so is fast."""
        require_provided(train.objective)
        optimizer = make_optimizer([trainable.flat], train.optimizer)
        return cls(trainable, train.objective, pad, train.max_length, optimizer)

    @property
    def device(self) -> torch.device:
        """Where the vector lies."""
        return self.trainable.flat.device

    def become(self, vector: Vector, rank: int | None = None) -> None:
        """Puts the vector (P,) of a client of this LoRA rank into the model; None is the recipe's rank."""
        self.trainable.set_rank(rank)
        self.trainable.flat.data.copy_(vector)

    def begin(self, lane: int, training: Training) -> None:
        """Puts the start into the model."""
        self.become(training.start, training.rank)
        seed_torch(training.dropout)
        if not self.trainable.network.training:  # train() walks over all layers
            self.trainable.network.train()

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Computes the gradient of the client's next step."""
        (client,) = active
        self.trainable.grad.zero_()
        step = self.cut(client.next_rows(), train.batch)
        counts = counted(self.objective, step)
        client.count(counts, sum(piece.tokens for piece in step))
        for piece in step:
            terms = self.objective.terms(self.trainable.network, piece.to(self.device))
            totals = {name: term.total() for name, term in terms.items()}
            step_loss(totals, counts).backward()
            client.add(totals)

    def correct(self, lane: int, correct: Correct) -> None:
        """Applies a correction to the gradient."""
        correct(self.trainable.grad[None], self.trainable.flat.data[None])

    def clip(self, norm: float) -> None:
        """Clips the gradient to an L2 norm; 0 leaves it alone."""
        clip(self.trainable.grad[None], norm)

    def step(self, adjust: Callable[[], None]) -> None:
        """Takes the optimizer's step."""
        adjust()
        self.optimizer.step()

    def end(self, lane: int, training: Training) -> Vector:
        """Returns a copy of the vector, or the vector minus `training.less` in its place: new pages cost time."""
        flat = self.trainable.flat.detach()
        return flat.clone() if training.less is None else flat.sub_(training.less)

    def loss_terms(self, rows: pa.RecordBatch, batch: int) -> dict[str, tuple[float, int]]:
        """Returns each term's sum and count over all rows, by the vector now in the model."""
        if self.trainable.network.training:
            self.trainable.network.eval()
        network, pieces = self.trainable.network, self.cut(rows, batch)
        return term_sums(self.objective, network, ((piece.to(self.device), 1) for piece in pieces))

    def cut(self, rows: pa.RecordBatch, batch: int) -> list[Batch]:
        """Cuts the rows into batches on the CPU, each of no more tokens than `batch` rows of the longest kind have."""
        if rows.num_rows <= batch:
            return [self.objective.collate(rows, self.pad)]
        numbers = pieces(lengths(rows), batch * self.max_length)
        return [self.objective.collate(rows.take(some), self.pad) for some in numbers]
