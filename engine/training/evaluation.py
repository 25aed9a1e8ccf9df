"""Held-out losses, client by client."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from engine.config.sections import Evaluate
from engine.objectives.base import Objective
from strategies.core.seeds import rng


class Evaluator(Protocol):
    """A trainer that evaluates the vector now in its model."""

    @property
    def objective(self) -> Objective:
        """Whose held-out term is the loss."""

    def loss_terms(self, rows: pa.RecordBatch, batch: int) -> dict[str, tuple[float, int]]:
        """Returns each term's sum and count over all rows."""


@dataclass(frozen=True)
class ClientLoss:
    """One client's held-out loss: the sum `nll` in nats over `tokens` tokens of `rows` rows."""

    client: int
    nll: float
    tokens: int
    rows: int


def drawn_rows(rows: int, client: int, evaluate: Evaluate, seed: int) -> np.ndarray:
    """Returns the sorted numbers of a client's evaluated rows: all, or `evaluate.rows` drawn once by the seed."""
    if rows <= evaluate.rows:
        return np.arange(rows)
    return np.sort(rng(seed, 0, client, "evaluate").choice(rows, evaluate.rows, replace=False))


def client_loss(trainer: Evaluator, client: int, rows: pa.RecordBatch, evaluate: Evaluate, seed: int) -> ClientLoss:
    """Evaluates the vector now in the model on a client's held-out rows.

    A batch holds rows of one client only, so that the bits do not depend on which clients a slot evaluates.
    """
    picked = drawn_rows(rows.num_rows, client, evaluate, seed)
    terms = trainer.loss_terms(rows.take(picked), evaluate.batch)
    return ClientLoss(client, *terms[trainer.objective.heldout], len(picked))


def mean_loss(losses: list[ClientLoss]) -> float:
    """Returns the mean loss over all clients' tokens, summed in the order of clients so that the bits are fixed."""
    ordered = sorted(losses, key=lambda loss: loss.client)
    tokens = sum(loss.tokens for loss in ordered)
    return sum(loss.nll for loss in ordered) / tokens if tokens else float("nan")
