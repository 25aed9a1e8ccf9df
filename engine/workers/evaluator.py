"""What a worker tells of models outside of a round: held-out losses, baselines, texts. Legend: P parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config.sections import Evaluate
from engine.config.train import Train
from engine.messages.broadcast import BroadcastMessage
from engine.objectives.base import Objective, Prompt
from engine.records.client_state import STRATEGY, owned_by
from engine.training.local_training import Trainer
from engine.training.step_loop import Trained, Training
from engine.workers.client_runner import ClientRunner
from strategies.core.protocol import Vector
from strategies.core.seeds import rng, sample_key, torch_seed

POOLED = -2  # the client number under which training on all clients' rows draws its batches


@dataclass(frozen=True)
class ClientLoss:
    """One client's held-out losses: each term's sum and number of units, such as tokens, over `rows` rows."""

    client: int
    terms: dict[str, tuple[float, int]]
    rows: int

    def metrics(self, name: str, objective: Objective) -> dict[str, float]:
        """Returns the held-out term's mean as `name`, NaN without units, its units as `tokens`, and each mean."""
        means = {term: total / count if count else math.nan for term, (total, count) in self.terms.items()}
        each = {f"{name}.{term}": mean for term, mean in means.items()} if len(means) > 1 else {}
        return {name: means[objective.heldout], "tokens": self.terms[objective.heldout][1], **each}


def drawn_rows(rows: int, client: int, evaluate: Evaluate, seed: int) -> np.ndarray:
    """Returns the sorted numbers of a client's evaluated rows: all, or `evaluate.rows` drawn once by the seed."""
    if rows <= evaluate.rows:
        return np.arange(rows)
    return np.sort(rng(seed, 0, client, "evaluate").choice(rows, evaluate.rows, replace=False))


def client_loss(
    trainer: Trainer,
    client: int,
    rows: pa.RecordBatch,
    evaluate: Evaluate,
    seed: int,
    reference: Vector | None = None,
) -> ClientLoss:
    """Evaluates the vector now in the model on a client's held-out rows; no batch holds rows of two clients."""
    picked = drawn_rows(rows.num_rows, client, evaluate, seed)

    def keys(row: int, sample: int) -> bytes:  # the same in all rounds
        return sample_key(seed, -1, client, 0, int(picked[row]), sample)

    return ClientLoss(client, trainer.loss_terms(rows.take(picked), evaluate.batch, reference, keys), len(picked))


def pooled(losses: list[ClientLoss], objective: Objective) -> ClientLoss:
    """Returns the losses over all clients' units, summed in the order of clients so that the bits are fixed."""
    ordered = sorted(losses, key=lambda loss: loss.client)
    terms = {
        name: (sum(loss.terms[name][0] for loss in ordered), sum(loss.terms[name][1] for loss in ordered))
        for name in objective.heldout_terms
    }
    return ClientLoss(-1, terms, sum(loss.rows for loss in ordered))


@dataclass(frozen=True)
class Evaluator:
    """Judges vectors (P,), or in a group of ranks all their shards together; ranks know no models of clients' own."""

    runner: ClientRunner
    trainer: Trainer
    tokenizer: Any

    def losses(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """Returns the vector's losses on at most `limit` held-out rows of each client."""
        self.trainer.become(message.vector(self.runner.peers.rank))
        return [self._loss(client, message, limit) for client in chunk]

    def generate(self, message: BroadcastMessage, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns the vector's greedy continuations, one for each prompt, the same in all ranks."""
        self.trainer.become(message.vector(self.runner.peers.rank))
        return self.trainer.generate(self.tokenizer, prompts, tokens)

    def personal(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """Returns the losses of each client's own model; none of a client whose model is the global one."""
        losses, strategy = [], self.runner.federation.strategy
        broadcast = self.runner.receive(message)
        for client in chunk:
            received = self.runner.received_by(client, broadcast)
            personal = strategy.personal(received, owned_by(self.runner.state_of(client, message.round), STRATEGY))
            if personal is not None:
                self.trainer.become(personal, received.lora_rank)
                losses.append(self._loss(client, message, limit))
        return losses

    def local_only(self, chunk: list[int], message: BroadcastMessage, steps: list[int]) -> list[ClientLoss]:
        """Returns the losses of models that clients trained alone, each for its number of steps from the vector."""
        losses, limit = [], self.runner.federation.evaluate.rows
        for client, client_steps in zip(chunk, steps, strict=True):
            self._train(self.runner.rows_of(client, "train", message), message, client_steps, client)
            losses.append(self._loss(client, message, limit))
        return losses

    def centralized(self, clients: list[int], message: BroadcastMessage, steps: int) -> np.ndarray:
        """Returns the vector (P,) after `steps` steps from that of the message on the pooled rows of all clients."""
        rows = pa.concat_batches([self.runner.rows_of(client, "train", message) for client in clients])
        (trained,) = self._train(rows, message, steps, POOLED)
        return trained.end.cpu().numpy()

    def _loss(self, client: int, message: BroadcastMessage, limit: int) -> ClientLoss:
        federation, reference = self.runner.federation, message.reference_vector(self.runner.peers.rank)
        rows, evaluate = self.runner.rows_of(client, "heldout", message), replace(federation.evaluate, rows=limit)
        return client_loss(self.trainer, client, rows, evaluate, federation.seed, reference)

    def _train(self, rows: pa.RecordBatch, message: BroadcastMessage, steps: int, client: int) -> Sequence[Trained]:
        """Trains on rows with the learning rates of all rounds after the message's, which share the steps equally."""
        federation, start = self.runner.federation, message.vector()
        train, seed = replace(federation.train, steps=steps, epochs=None), federation.seed
        stream, dropout = rng(seed, 0, client, "batches"), torch_seed(seed, 0, client, "dropout")
        step_factor = partial(_factor, federation.train, message.round, federation.rounds)
        reference, device = message.reference_vector(), self.trainer.device
        reference = None if reference is None else reference.to(device)
        keys = partial(sample_key, seed, 0, client)
        options = {"step_factor": step_factor, "reference": reference, "keys": keys}
        training = Training(rows, start.to(device), stream, dropout, **options)
        return self.trainer.train([training], train)


def _factor(train: Train, begun: int, rounds: int, at: int, total: int) -> float:
    """Returns the factor on the learning rate of step `at` of `total`, which stand for the rounds that are left.

    After the last round only the schedule over the steps of one training is left.
    """
    left = rounds - begun
    if not left:
        return train.over_steps.factor(at, total)
    round_ = at * left // total
    first, end = (-(-number * total // left) for number in (round_, round_ + 1))
    return train.over_rounds.factor(begun + round_, rounds) * train.over_steps.factor(at - first, end - first)
