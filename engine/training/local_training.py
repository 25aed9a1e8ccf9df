"""A client's local training, free of Ray: from the broadcast to an update. Legend: P parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from engine.config.federation import Federation
from engine.config.train import Train
from engine.models.base_model import compute_in
from engine.models.seeded import Seeded
from engine.models.trainable import Trainable
from engine.objectives.base import (
    REFERENCE,
    Context,
    Objective,
    Prompt,
    Term,
    TermSums,
    Tokenizer,
    counted,
    step_loss,
    term_sums,
)
from engine.objectives.sampling import Answers
from engine.objectives.token_batch import Batch, longest
from engine.records.client_state import OPTIMIZER, STRATEGY, owned_as, owned_by
from engine.training.generation import continuations
from engine.training.optimizers import clip, make_optimizer
from engine.training.rollouts import Key
from engine.training.sampler import RowKeys, Sampler
from engine.training.step_columns import constant, judging, with_columns, without_adapters
from engine.training.step_loop import Correct, Progress, Trained, Training, batches, optimizer_step, pieces, take_steps
from strategies.core.base import Finished
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Update, Vector
from strategies.core.seeds import rng, sample_key, seed_torch, torch_seed

NO_KEYS: RowKeys = partial(sample_key, 0, 0, 0, 0)

TOGETHER = 8  # rows at once of which the reference's columns are computed


@dataclass(frozen=True)
class Job:
    """A client's work in a round: its encoded rows, its weight in the sum, the broadcast, and its client state.

    `reference` is the vector of the objective's reference model; None: the model without its adapters.
    """

    client: int
    rows: pa.RecordBatch
    weight: float
    broadcast: Broadcast
    state: ClientState
    reference: Vector | None = None


class ClientTrainer(Protocol):
    """What makes updates of clients."""

    def updates(self, jobs: list[Job], federation: Federation, *, view: bool = False) -> list[Finished]:
        """Trains clients for a round: see `client_updates`."""


class Trainer(ClientTrainer, Protocol):
    """A model that is trained and judged; a gang's rank has shards for vectors."""

    @property
    def device(self) -> torch.device:
        """Where the vector lies."""

    def become(self, vector: Vector, lora_rank: int | None = None) -> None:
        """Puts the vector (P,) of a client of this LoRA rank into the model; None is the recipe's rank."""

    def loss_terms(
        self, rows: pa.RecordBatch, batch: int, reference: Vector | None = None, keys: RowKeys = NO_KEYS
    ) -> TermSums:
        """Returns each term's sum and count over all rows, by the vector now in the model; reference as in a Job.

        Completions are drawn by `keys`.
        """

    def answers(self, rows: pa.RecordBatch, batch: int, keys: RowKeys) -> pa.RecordBatch:
        """Completes each held-out prompt by the vector now in the model: by sampling, and with the likeliest tokens."""

    def step_means(self, rows: pa.RecordBatch, batch: int, reference: Vector | None) -> dict[str, float]:
        """Returns the objective's means over these rows, by the vector now in the model."""

    def train(self, trainings: Sequence[Training], train: Train) -> list[Trained]:
        """Does all trainings; returns their results in order."""

    def generate(self, tokenizer: Tokenizer, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns greedy continuations of at most `tokens` tokens by the vector now in the model."""


def client_updates(trainer: Trainer, jobs: list[Job], federation: Federation, *, view: bool = False) -> list[Finished]:
    """Trains clients; returns finished updates and new states. With `view` an update lasts until the next training."""
    sent = [job.broadcast for job in jobs]  # on the CPU, where the strategy finishes updates
    on_device = _on(trainer.device, sent)
    jobs = [replace(job, broadcast=broadcast) for job, broadcast in zip(jobs, on_device, strict=True)]
    ends, metrics, moments = ([dict[str, Any]() for _ in jobs] for _ in range(3))
    if federation.strategy.loss_before:
        for job, figures in zip(jobs, metrics, strict=True):
            trainer.become(job.broadcast.params, job.broadcast.lora_rank)
            terms = trainer.loss_terms(job.rows, federation.train.batch, job.reference)
            counted_terms = (terms[name] for name in federation.train.objective.losses)
            figures["loss_before"] = sum(total / max(1, count) for total, count in counted_terms)
    means = [_round_means(trainer, job, federation) for job in jobs]
    trainings = [
        _trainings(job, federation, trainer.device, its_means, view=view)
        for job, its_means in zip(jobs, means, strict=True)
    ]
    for model in dict.fromkeys(model for by_model in trainings for model in by_model):
        members = [place for place, by_model in enumerate(trainings) if model in by_model]
        results = trainer.train([trainings[place][model] for place in members], federation.train)
        for place, trained in zip(members, results, strict=True):
            is_end = model == GLOBAL and trainings[place][model].origin is None
            ends[place][model] = trained.end.sub_(jobs[place].broadcast.params) if is_end else trained.end
            moments[place] |= owned_as(trained.moments, f"{OPTIMIZER}{model}.")
            if model == GLOBAL:
                metrics[place] |= trained.metrics
    finished = []
    for job, broadcast, vectors, figures, state in zip(jobs, sent, ends, metrics, moments, strict=True):
        on_cpu = {name: end.cpu() for name, end in vectors.items()}
        update = Update(job.client, job.weight, on_cpu.pop(GLOBAL), metrics=figures)
        update, after = federation.strategy.finish(update, broadcast, owned_by(job.state, STRATEGY), on_cpu)
        finished.append((update, owned_as(after, STRATEGY) | state))
    return finished


def _round_means(trainer: Trainer, job: Job, federation: Federation) -> dict[str, float] | None:
    """Returns the objective's means over the round, by the model that it starts from; None if they are over steps."""
    objective, broadcast = federation.train.objective, job.broadcast
    if not objective.means or objective.means_over == "step":
        return None
    trainer.become(broadcast.params, broadcast.lora_rank)
    rows, stream = job.rows.num_rows, rng(federation.seed, broadcast.round, job.client, "kl")
    numbers = np.sort(stream.choice(rows, min(rows, objective.mean_rows), replace=False))
    return trainer.step_means(job.rows.take(pa.array(numbers)), federation.train.batch, job.reference)


def _trainings(
    job: Job, federation: Federation, device: torch.device, means: Mapping[str, float] | None, *, view: bool
) -> dict[str, Training]:
    """Makes all trainings of a client in a round, by the strategy's name for each."""
    strategy, train, seed, broadcast = federation.strategy, federation.train, federation.seed, job.broadcast
    state = {name: tensor.to(device) for name, tensor in owned_by(job.state, STRATEGY).items()}
    starts = strategy.starts(broadcast, state)
    by_row = federation.privacy.dp.kind == "example"

    def correct(model: str, grad_KP: Vector, params_KP: Vector) -> None:
        strategy.correct(grad_KP, params_KP, broadcast, state, model)

    return {
        model: Training(
            job.rows,
            start,
            rng(seed, broadcast.round, job.client, "batches" if model == GLOBAL else "personal"),
            torch_seed(seed, broadcast.round, job.client, "dropout"),
            lora_rank=broadcast.lora_rank,
            # None where there is no correction, which saves gangs copies.
            correct=partial(correct, model) if strategy.corrects else None,
            round_factor=train.over_rounds.factor(broadcast.round, federation.rounds),
            moments=owned_by(job.state, f"{OPTIMIZER}{model}.") if train.state == "keep" else None,
            origin=broadcast.params if view and len(starts) == 1 else None,
            trained_mask=strategy.trained_mask(broadcast, state, model) if by_row else None,
            reference=None if job.reference is None else job.reference.to(device),
            means=means,
            keys=partial(sample_key, seed, broadcast.round, job.client),
        )
        for model, start in starts.items()
    }


def _on(device: torch.device, broadcasts: list[Broadcast]) -> list[Broadcast]:
    """Returns the broadcasts with their vectors on the device; a vector that several clients share is copied once."""
    vectors = {id(vector): vector for sent in broadcasts for vector in (sent.params, *sent.extras.values())}
    moved = {key: vector.to(device) for key, vector in vectors.items()}
    return [
        replace(sent, params=moved[id(sent.params)], extras={name: moved[id(x)] for name, x in sent.extras.items()})
        for sent in broadcasts
    ]


class LocalTrainer:
    """Trains one client at a time, on the whole model in one process. A backend of the step loop, and a Trainer."""

    lanes = 1
    batches = staticmethod(batches)
    prepared: Any = staticmethod(nullcontext)
    summed = staticmethod(float)  # there is one rank
    train = take_steps
    updates = client_updates
    step = optimizer_step

    def __init__(
        self,
        trainable: Trainable | Seeded,
        pad: int,
        train: Train,
        tokenizer: Tokenizer | None = None,
        models: Sequence[Any] = (),
    ) -> None:
        """The tokenizer writes completions for rewards; `models` are the objective's frozen ones."""
        self.trainable, self.device, self.pad = trainable, trainable.flat.device, pad
        self.objective: Objective = train.objective
        self.max_length, self.context = train.max_length, Context(models=tuple(models), tokenizer=tokenizer)
        self.sampler = Sampler(train.objective, trainable.network, self.context, pad, self.device)
        if "head" in self.objective.needs:
            trainable.network.config.pad_token_id = pad  # by which it finds a text's last token
        if train.dtype == "bfloat16":
            compute_in(trainable.network, self.device, torch.bfloat16)
        self.optimizer = make_optimizer([trainable.flat], train.optimizer)  # it sees one tensor, and so is fast

    def become(self, vector: Vector, lora_rank: int | None = None) -> None:
        """Puts the vector (P,) of a client of this LoRA rank into the model; None is the recipe's rank."""
        self.trainable.set_lora_rank(lora_rank)
        self.trainable.become(vector)

    def begin(self, lane: int, training: Training) -> None:
        """Puts the start into the model."""
        self.become(training.start, training.lora_rank)
        seed_torch(training.dropout)
        if not self.trainable.network.training:  # train() walks over all layers
            self.trainable.network.train()

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Computes the gradient of the client's next step."""
        (client,) = active
        (rows,) = self.sampler.next_rows(active, train)
        compared = client.training.reference, client.training.means
        client.count(*self.step_gradient(rows, train.batch, client.add, *compared))

    def step_gradient(
        self,
        rows: pa.RecordBatch,
        batch: int,
        add: Callable[[Mapping[str, torch.Tensor]], None],
        reference: Vector | None = None,
        means: Mapping[str, float] | None = None,
    ) -> tuple[Mapping[str, int], int]:
        """Computes the gradient of a step's rows; returns each term's units, and the tokens.

        `batch` rows go through the model at once, and `add` takes the terms' sums over each such piece. Reference and
        means are as in a Training.
        """
        self.trainable.grad.zero_()
        step = self.cut(rows, batch)
        counts = counted(self.objective, step)
        for piece in self.with_columns(step, reference, means):
            terms = self.objective.terms(self.trainable.network, piece.to(self.device), self.context)
            totals = {name: term.total() for name, term in terms.items()}
            step_loss(self.objective, totals, counts).backward()
            add(totals)
        return counts, sum(piece.tokens for piece in step)

    def correct(self, lane: int, correct: Correct) -> None:
        """Applies a correction to the gradient."""
        correct(self.trainable.grad[None], self.trainable.flat.data[None])

    def clip(self, norm: float) -> None:
        """Clips the gradient to an L2 norm; 0 leaves it alone."""
        clip(self.trainable.grad[None], norm)

    def end(self, lane: int, training: Training) -> Vector:
        """Returns a copy of the vector, or the vector minus `training.origin` in its place: new pages cost time."""
        flat = self.trainable.flat.detach()
        return flat.clone() if training.origin is None else flat.sub_(training.origin)

    def loss_terms(
        self, rows: pa.RecordBatch, batch: int, reference: Vector | None = None, keys: RowKeys = NO_KEYS
    ) -> TermSums:
        """Returns each term's sum and count over all rows, by the vector now in the model; reference as in a Job."""
        if self.objective.judges_samples:
            return self._judged(rows, batch, reference, keys)
        network = self.trainable.network
        if network.training:
            network.eval()
        rows = self.objective.step_rows(rows, np.arange(rows.num_rows))
        pieces = self.with_columns(self.cut(rows, batch), reference)
        return term_sums(self.objective, network, ((piece.to(self.device), 1) for piece in pieces), self.context)

    def _judged(self, rows: pa.RecordBatch, batch: int, reference: Vector | None, keys: RowKeys) -> TermSums:
        """Judges completions of prompts, also beside those of the reference model."""
        objective, network, given = self.objective, self.trainable.network, self.answers(rows, batch, keys)
        if objective.reference == "none":
            return objective.judged(Answers(given))
        pieces = [piece.to(self.device) for piece in self.cut(given, batch)]

        def logprobs() -> torch.Tensor:
            columns = [objective.reference_columns(network, piece, self.context)[REFERENCE] for piece in pieces]
            return torch.cat(columns)[::2]  # of the samples

        with judging(network):
            ours_BC = logprobs()
        with self.as_reference(reference):
            referred, theirs_BC = self.answers(rows, batch, keys), logprobs()
        return objective.judged(Answers(given, referred, (ours_BC - theirs_BC).sum(1)))

    def answers(self, rows: pa.RecordBatch, batch: int, keys: RowKeys) -> pa.RecordBatch:
        """Completes each held-out prompt by the vector now in the model: by sampling, and with the likeliest tokens."""

        def beside_greedy(row: int, sample: int) -> Key:
            return None if sample else keys(row, sample)

        return self.sampler.completed(rows, beside_greedy, 2, batch)

    def step_means(self, rows: pa.RecordBatch, batch: int, reference: Vector | None) -> dict[str, float]:
        """Returns the objective's means over these rows, by the vector now in the model."""
        rows = self.objective.step_rows(rows, np.arange(rows.num_rows))
        first = self.with_columns(self.cut(rows, batch), reference)[0]
        return {name: first.columns[name][0].item() for name in self.objective.means}

    def reference_column(self, rows: pa.RecordBatch, reference: Vector | None) -> np.ndarray:
        """Returns what the reference model says of these rows (rows, G), float32; always in the same pieces."""
        parts = []
        for first in range(0, rows.num_rows, TOGETHER):
            piece = self.objective.collate(rows.slice(first, TOGETHER), self.pad)
            (piece,) = self.with_columns([piece], reference)
            parts.append(piece.columns[REFERENCE].float().view(-1, piece.group).cpu().numpy())
        return np.concatenate(parts)

    def with_columns(
        self,
        step: list[Batch],
        reference: Vector | None,
        means: Mapping[str, float] | None = None,
        *,
        every_logit: bool = False,
    ) -> Sequence[Batch]:
        """Returns a step's batches with the columns that the objective reads; see `with_columns`."""
        if not self.objective.reads_reference and not self.objective.means:
            return step  # on the CPU still
        on_device, context = [piece.to(self.device) for piece in step], replace(self.context, every_logit=every_logit)
        refer, known = partial(self.as_reference, reference), None if means is None else partial(constant, means)
        return with_columns(self.objective, self.trainable.network, on_device, context, refer, self._averages, known)

    @contextmanager
    def as_reference(self, reference: Vector | None) -> Iterator[None]:
        """Lets the model compute as the reference, without gradients; it is as it was afterwards."""
        trainable = self.trainable
        with judging(trainable.network), ExitStack() as at_end:
            if self.objective.reference != "round":
                at_end.enter_context(trainable.unmerged())
            if reference is None:
                at_end.enter_context(without_adapters(trainable.network))
            else:
                at_end.callback(trainable.flat.data.copy_, trainable.flat.detach().clone())
                trainable.flat.data.copy_(reference)
            yield

    def _averages(self, name: str, terms: Sequence[Term], batches: Sequence[Batch]) -> list[torch.Tensor]:
        count = sum(self.objective.counts(batch)[name] for batch in batches)
        mean = torch.stack([term.total() for term in terms]).sum() / max(1, count)
        return [mean.expand(len(batch.ids_BT)) for batch in batches]

    def generate(self, tokenizer: Tokenizer, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns greedy continuations of at most `tokens` tokens by the vector now in the model."""
        return continuations(self.trainable.network, self.pad, self.device, tokenizer, prompts, tokens)

    def cut(self, rows: pa.RecordBatch, batch: int) -> list[Batch]:
        """Cuts the rows into batches on the CPU, each of no more tokens than `batch` rows of the longest kind have."""
        if rows.num_rows <= batch:
            return [self.objective.collate(rows, self.pad)]
        numbers = pieces(longest(rows), batch * self.max_length)
        return [self.objective.collate(rows.take(some), self.pad) for some in numbers]
