"""A client's work on a base that another party has. Legend: P trained numbers, C candidates."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from engine.config.federation import Federation
from engine.config.train import Train
from engine.messages.exposure import Exposure, PromptGradient, Scores, Texts, Usage
from engine.models.prefixed import Projection
from engine.objectives.base import Prompt, TermSums, Tokenizer
from engine.objectives.token_batch import lengths
from engine.training.local_training import NO_KEYS, Job, client_updates
from engine.training.optimizers import clip, make_optimizer
from engine.training.sampler import RowKeys
from engine.training.searching import Judged, mismatches
from engine.training.step_loop import Correct, Progress, Training, batches, optimizer_step, take_steps
from strategies.core.base import Finished
from strategies.core.protocol import Vector

ID_BYTES = 4


class Service(Protocol):
    """What clients may ask the base's owner for, in a round; `judge`, `continuations` are the simulator's own."""

    def score(self, round_: int, candidates_CP: np.ndarray, rows: pa.RecordBatch, batch: int) -> Scores:
        """Returns the summed losses of rows behind each candidate prompt."""

    def gradient(self, round_: int, prompt_P: np.ndarray, rows: pa.RecordBatch, batch: int) -> PromptGradient:
        """Returns the gradient of the rows' mean loss with respect to a prompt."""

    def write(self, round_: int, prompt_P: np.ndarray, texts: list[np.ndarray], most: list[int]) -> Texts:
        """Returns the likeliest tokens behind texts with a prompt before them, at most a number of each."""

    def judge(self, prompt_P: np.ndarray, rows: pa.RecordBatch, batch: int) -> TermSums:
        """Returns each term's sum and count on held-out rows, which no party sees."""

    def continuations(self, prompt_P: np.ndarray, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns samples for the report, which no party sees."""

    def probe(self, round_: int) -> str:
        """Returns a digest of the answers to public rows."""


class RemoteTrainer:
    """Trains a prompt by the owner's gradients, and judges candidates by its scores. A backend and a Trainer.

    `exposures` tell what each client's calls have shown of it, until they are taken.
    """

    lanes = 1
    batches = staticmethod(batches)
    prepared: Any = staticmethod(nullcontext)
    summed = staticmethod(float)
    train = take_steps
    step = optimizer_step

    def __init__(self, service: Service, federation: Federation, start: Vector, projection: Projection | None) -> None:
        """`projection` makes prompts of what is searched, if they are projected."""
        self.service, self.federation, self.objective = service, federation, federation.train.objective
        self.device, self.projection = torch.device("cpu"), projection
        self.flat = torch.nn.Parameter(start.clone())
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = make_optimizer([self.flat], federation.train.optimizer)
        self.client, self.round = -1, 0
        self.exposures: dict[int, list[Exposure]] = {}

    def updates(self, jobs: list[Job], federation: Federation, *, view: bool = False) -> list[Finished]:
        """Trains clients one after another, as `client_updates` does."""
        finished = []
        for job in jobs:
            self.client, self.round = job.client, job.broadcast.round + 1
            finished += client_updates(self, [job], federation)
        return finished

    def judged(self, job: Job, numbers: np.ndarray, rows: pa.RecordBatch, candidates_CP: torch.Tensor) -> Judged:
        """Judges candidates (C, P) on a job's rows, which the owner then sees."""
        self.client, self.round = job.client, job.broadcast.round + 1
        if self.federation.strategy.judges_by == "match":
            return mismatches(rows, candidates_CP, partial(self._written, numbers))
        prompts_CP = np.stack([self._prompt(candidate_P) for candidate_P in candidates_CP])
        scores = self.service.score(self.round, prompts_CP, rows, self.federation.train.batch)
        self._expose(numbers, rows, prompts_CP, scores.usage)
        return scores.losses_C, scores.units

    def taken(self, client: int) -> tuple[Exposure, ...]:
        """Returns what a client has exposed since the last time."""
        return tuple(self.exposures.pop(client, ()))

    def become(self, vector: Vector, lora_rank: int | None = None) -> None:
        """Takes the vector (P,) of a client."""
        self.flat.data.copy_(vector)

    def begin(self, lane: int, training: Training) -> None:
        """Takes the start."""
        self.become(training.start)

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Asks for the gradient of the client's next step."""
        (client,) = active
        numbers = next(client.batches)
        rows = self.objective.step_rows(client.training.rows, numbers)
        prompt_P = self._prompt(self.flat.detach())
        answer = self.service.gradient(self.round, prompt_P, rows, train.batch)
        assert self.flat.grad is not None
        self.flat.grad.copy_(torch.from_numpy(answer.gradient_P))
        client.count(answer.counts, answer.tokens)
        client.add({name: torch.tensor(total, dtype=torch.float64) for name, total in answer.totals.items()})
        self._expose(numbers, rows, prompt_P[None], answer.usage)

    def correct(self, lane: int, correct: Correct) -> None:
        """Applies a correction to the gradient."""
        assert self.flat.grad is not None
        correct(self.flat.grad[None], self.flat.data[None])

    def clip(self, norm: float) -> None:
        """Clips the gradient to an L2 norm; 0 leaves it alone."""
        assert self.flat.grad is not None
        clip(self.flat.grad[None], norm)

    def end(self, lane: int, training: Training) -> Vector:
        """Returns a copy of the vector, or of its change from `training.origin`."""
        flat = self.flat.detach().clone()
        return flat if training.origin is None else flat.sub_(training.origin)

    def loss_terms(
        self, rows: pa.RecordBatch, batch: int, reference: Vector | None = None, keys: RowKeys = NO_KEYS
    ) -> TermSums:
        """Returns each term's sum and count over held-out rows."""
        return self.service.judge(self._prompt(self.flat.detach()), rows, batch)

    def generate(self, tokenizer: Tokenizer, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns greedy continuations."""
        return self.service.continuations(self._prompt(self.flat.detach()), prompts, tokens)

    def answers(self, rows: pa.RecordBatch, batch: int, keys: RowKeys) -> pa.RecordBatch:
        """Objectives that sample need the base at home."""
        raise NotImplementedError

    def step_means(self, rows: pa.RecordBatch, batch: int, reference: Vector | None) -> dict[str, float]:
        """Objectives with means over steps need the base at home."""
        raise NotImplementedError

    def places(self, vector: Vector) -> Vector:
        """Returns the vectors (N, D) in front of the tokens that a vector (P,) stands for."""
        prompt = vector if self.projection is None else self.projection(vector)
        return prompt.view(self.federation.model.peft.virtual_tokens, -1)

    def _prompt(self, vector: Vector) -> np.ndarray:
        """Returns the prompt that the owner sees."""
        prompt: np.ndarray = (vector if self.projection is None else self.projection(vector)).numpy()
        return prompt

    def _written(
        self, numbers: np.ndarray, vector: Vector, prompts: list[np.ndarray], most: list[int]
    ) -> list[list[int]]:
        prompt_P = self._prompt(vector)
        texts = self.service.write(self.round, prompt_P, prompts, most)
        nbytes = prompt_P.nbytes + ID_BYTES * sum(map(len, prompts))
        self._noted(Exposure(self._kind, tuple(numbers.tolist()), 1, texts.usage, nbytes))
        return texts.ids

    @property
    def _kind(self) -> str:
        return self.federation.model.peft.sent

    def _expose(self, numbers: np.ndarray, rows: pa.RecordBatch, prompts_CP: np.ndarray, usage: Usage) -> None:
        nbytes = prompts_CP.nbytes + len(prompts_CP) * ID_BYTES * int(lengths(rows).sum())
        self._noted(Exposure(self._kind, tuple(numbers.tolist()), len(prompts_CP), usage, nbytes))

    def _noted(self, exposure: Exposure) -> None:
        self.exposures.setdefault(self.client, []).append(exposure)


@dataclass
class PlugInJudge:
    """Trains on an emulator, and is judged by the base's owner, who plugs the trained ends into the base."""

    plain: Any  # the trainer of the emulator
    service: Service

    def __post_init__(self) -> None:
        self.device, self.train, self.updates = self.plain.device, self.plain.train, self.plain.updates
        self.answers, self.step_means = self.plain.answers, self.plain.step_means
        self.vector = self.plain.trainable.flat.detach().clone()

    def become(self, vector: Vector, lora_rank: int | None = None) -> None:
        """Takes the vector (P,) of the ends."""
        self.vector = vector.clone()

    def loss_terms(
        self, rows: pa.RecordBatch, batch: int, reference: Vector | None = None, keys: RowKeys = NO_KEYS
    ) -> TermSums:
        """Returns each term's sum and count over held-out rows, by the base with the ends."""
        return self.service.judge(self.vector.cpu().numpy(), rows, batch)

    def generate(self, tokenizer: Tokenizer, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns greedy continuations by the base with the ends."""
        return self.service.continuations(self.vector.cpu().numpy(), prompts, tokens)
