"""What a worker tells of models outside of a round: held-out losses and baselines. Legend: P parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from engine.config.train import Train
from engine.messages.broadcast import BroadcastMessage
from engine.records.client_state import STRATEGY, part
from engine.training.evaluation import ClientLoss, client_loss
from engine.training.evaluation import Evaluator as Judged
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training
from engine.workers.client_runner import ClientRunner
from strategies.core.protocol import Vector
from strategies.core.seeds import rng, torch_seed

POOLED = -2  # the client number under which training on all clients' rows draws its batches


@dataclass(frozen=True)
class Evaluator:
    """Judges a vector (P,) on held-out rows, or in a group of ranks all shards of it together.

    `become` puts a vector into the model that `judged` is about.
    """

    runner: ClientRunner
    judged: Judged
    become: Callable[[Vector], None]

    def losses(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """Returns the vector's losses on at most `limit` held-out rows of each client."""
        self.become(message.vector(self.runner.peers.rank))
        return [self.loss(client, limit) for client in chunk]

    def loss(self, client: int, limit: int) -> ClientLoss:
        """Returns the present vector's loss on at most `limit` held-out rows of a client."""
        federation = self.runner.federation
        rows, evaluate = self.runner.tokens.rows(client, "heldout"), replace(federation.evaluate, rows=limit)
        return client_loss(self.judged, client, rows, evaluate, federation.seed)


@dataclass(frozen=True)
class OwnModels:
    """Judges models that are not the global one: clients' own, and those of the baselines."""

    runner: ClientRunner
    evaluator: Evaluator
    trainer: LocalTrainer

    def personal(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """Returns the losses of each client's own model; none of a client whose model is the global one."""
        losses, strategy = [], self.runner.federation.strategy
        broadcast = self.runner.receive(message)
        for client in chunk:
            received = self.runner.received_by(client, broadcast)
            personal = strategy.personal(received, part(self.runner.state_of(client, message.round), STRATEGY))
            if personal is not None:
                self.trainer.become(personal, received.rank)
                losses.append(self.evaluator.loss(client, limit))
        return losses

    def local_only(self, chunk: list[int], message: BroadcastMessage, steps: list[int]) -> list[ClientLoss]:
        """Returns the losses of models that clients trained alone, each for its number of steps from the vector."""
        losses, limit = [], self.runner.federation.evaluate.rows
        for client, client_steps in zip(chunk, steps, strict=True):
            self._train(self.runner.tokens.rows(client, "train"), message, client_steps, client)
            losses.append(self.evaluator.loss(client, limit))
        return losses

    def centralized(self, clients: list[int], message: BroadcastMessage, steps: int) -> np.ndarray:
        """Returns the vector (P,) after `steps` steps from that of the message on the pooled rows of all clients."""
        rows = pa.concat_batches([self.runner.tokens.rows(client, "train") for client in clients])
        self._train(rows, message, steps, POOLED)
        return self.trainer.trainable.flat.detach().cpu().numpy().copy()

    def _train(self, rows: pa.RecordBatch, message: BroadcastMessage, steps: int, client: int) -> None:
        """Trains on rows with the learning rates of all rounds after the message's, which share the steps equally."""
        federation, start = self.runner.federation, message.vector()
        train, seed = replace(federation.train, steps=steps, epochs=None), federation.seed
        stream, dropout = rng(seed, 0, client, "batches"), torch_seed(seed, 0, client, "dropout")
        factor = partial(_factor, federation.train, message.round, federation.rounds)
        self.trainer.train([Training(rows, start.to(self.trainer.device), stream, dropout, factor=factor)], train)


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
