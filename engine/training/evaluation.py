"""Held-out losses, client by client."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from engine.config.sections import Evaluate
from engine.objectives.base import Objective, terms_of
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
    """One client's held-out losses: each term's sum and number of units, such as tokens, over `rows` rows."""

    client: int
    terms: dict[str, tuple[float, int]]
    rows: int

    def metrics(self, name: str, objective: Objective) -> dict[str, float]:
        """Returns the mean of the objective's held-out term as `name`, and each term's mean if there are several.

        A mean is NaN without units. `tokens` are the units of the held-out term.
        """
        means = {term: total / count if count else math.nan for term, (total, count) in self.terms.items()}
        each = {f"{name}_{term}": mean for term, mean in means.items()} if len(means) > 1 else {}
        return {name: means[objective.heldout], "tokens": self.terms[objective.heldout][1], **each}


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
    return ClientLoss(client, trainer.loss_terms(rows.take(picked), evaluate.batch), len(picked))


def pooled(losses: list[ClientLoss], objective: Objective) -> ClientLoss:
    """Returns the losses over all clients' units, summed in the order of clients so that the bits are fixed."""
    ordered = sorted(losses, key=lambda loss: loss.client)
    terms = {}
    for name in terms_of(objective):
        totals, counts = zip(*(loss.terms[name] for loss in ordered), strict=True) if ordered else ((0.0,), (0,))
        terms[name] = sum(totals), sum(counts)
    return ClientLoss(-1, terms, sum(loss.rows for loss in ordered))
