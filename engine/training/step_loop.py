"""The step loop: takes clients through their optimizer steps. Legend: K lanes, P parameters.

A backend gives batches and gradients and takes the optimizer's step: one client at a time (local_training.py), several
in lanes (lanes.py), with example-level privacy (per_example.py), or over the ranks of a gang (deepspeed_training.py).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from engine.config.train import Train
from engine.objectives.base import Objective, term_metrics
from engine.training.optimizers import kept, move, restore
from strategies.core.protocol import ClientState, Mask, Vector
from strategies.core.seeds import sample_key


def batches(rows: int, train: Train, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields the row numbers (B,) of each step, for `train.steps` steps or `train.epochs` passes.

    A step takes `train.batch` * `train.accumulate` rows. Each pass shuffles all rows, and its last step takes the rest.
    """
    per_step, order = train.batch * train.accumulate, np.arange(0)
    per_pass = -(-rows // per_step)
    for step in range(steps_of(rows, train)):
        start = step % per_pass * per_step
        if start == 0:
            order = rng.permutation(rows)
        yield order[start : start + per_step]


def pieces(lengths_B: np.ndarray, most_tokens: int) -> list[np.ndarray]:
    """Cuts rows of these lengths into pieces of at most `most_tokens` tokens with padding; returns their row numbers.

    A piece has rows of similar length, and at least one row; the longest rows come first. If all rows fit into one
    piece, they keep their order.
    """
    if len(lengths_B) * int(lengths_B.max()) <= most_tokens:
        return [np.arange(len(lengths_B))]
    order, cut, first = np.argsort(-lengths_B, kind="stable"), list[np.ndarray](), 0
    while first < len(order):
        rows = max(1, most_tokens // int(lengths_B[order[first]]))
        cut.append(order[first : first + rows])
        first += rows
    return cut


def steps_of(rows: int, train: Train) -> int:
    """Returns the number of optimizer steps that a client of `rows` rows takes in a round."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return train.epochs * -(-rows // (train.batch * train.accumulate))


Correct = Callable[[torch.Tensor, torch.Tensor], None]  # changes gradients (K, P), given the vectors (K, P)
Keys = Callable[[int, int, int], bytes]  # of a step, row and sample, by their numbers: the key of the sample's draws
UNKEYED: Keys = partial(sample_key, 0, 0, 0)


@dataclass(frozen=True)
class Training:
    """One client's local training on encoded `rows` from the vector `start` (P,), or a rank's shard of it.

    `stream` draws the batches, `dropout` is torch's seed. `lora_rank` is the client's own where they are mixed.
    `correct` may change each step's gradient; every learning rate is times `round_factor`. With `moments` the
    optimizer continues from that state and the result has the new one; None starts from nothing. The result is a copy
    of the vector, or with `origin` its change from there, which may lie in the trainer's memory until the next
    training. Example-level privacy clips and adds noise on the coordinates in `trained_mask`; None: all.
    `step_factor` stands in for `train.over_steps`: of a step's number and all steps it makes a further factor.
    `reference` is the vector of the model that the objective compares with; None: the model without its adapters.
    `means` are the objective's, where they are over a round; None: over each step. `keys` are those of the draws of
    completions.
    """

    rows: pa.RecordBatch
    start: Vector
    stream: np.random.Generator
    dropout: int
    lora_rank: int | None = None
    correct: Correct | None = None
    round_factor: float = 1.0
    moments: ClientState | None = None
    origin: Vector | None = None
    trained_mask: Mask | None = None
    step_factor: Callable[[int, int], float] | None = None
    reference: Vector | None = None
    means: Mapping[str, float] | None = None
    keys: Keys = UNKEYED


@dataclass(frozen=True)
class Trained:
    """The result of a training: the vector (P,), its metrics, and the optimizer's state if it is kept."""

    end: Vector
    metrics: dict[str, float]
    moments: ClientState


@dataclass
class Progress:
    """A client on its way through its steps. Sums and counts are of the loss's terms, over the steps taken."""

    place: int  # among the trainings
    training: Training
    batches: Iterator[np.ndarray]
    steps: int  # to take
    taken: int = 0
    tokens: int = 0
    lr_sum: float = 0.0  # of the steps taken
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    ahead: deque[pa.RecordBatch] = field(default_factory=deque)  # the rows of the next steps, completed already

    def next_rows(self, objective: Objective) -> pa.RecordBatch:
        """Returns the rows of the next step."""
        return objective.step_rows(self.training.rows, next(self.batches))

    def count(self, counts: Mapping[str, int], tokens: int) -> None:
        """Adds a step's units of each term, and its tokens."""
        self.tokens += tokens
        self.counts.update(counts)

    def add(self, totals: Mapping[str, torch.Tensor]) -> None:
        """Adds sums of terms (scalars) in float64, on their device, so that no step waits for a GPU."""
        for name, total in totals.items():
            value = total.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def metrics(self, objective: Objective, summed: Callable[[float], float]) -> dict[str, float]:
        """Returns the training's metrics; `summed` adds a figure up over all ranks.

        `loss` is the sum of its terms' means, each unit judged before its step. `learned` counts the units of the first
        term, `rates` sums the steps' learning rates. Of several terms each one's mean and units follow.
        """
        terms = term_metrics(objective)
        totals = {name: summed(total.item()) for name, total in self.sums.items()}  # none after empty samples alone
        means = {name: totals.get(name, 0.0) / max(1, self.counts[name]) for name in terms}
        loss, learned = sum((means[name] for name in objective.losses), 0.0), self.counts[next(iter(terms))]
        rows, steps, tokens = float(self.training.rows.num_rows), float(self.taken), float(summed(self.tokens))
        metrics = {"loss": loss, "rows": rows, "steps": steps, "tokens": tokens, "learned": float(learned)}
        metrics["rates"] = self.lr_sum  # the name under which run folders have it
        for name, (mean_key, units_key) in terms.items():
            metrics |= {mean_key: means[name], units_key: float(self.counts[name])}
        return metrics


class Backend(Protocol):
    """A model and an optimizer, with a parameter group for each lane, that train up to `lanes` clients at once."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    lanes: int

    def batches(self, rows: int, train: Train, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yields the row numbers of each step."""

    def prepared(self, active: list[Progress], /) -> AbstractContextManager[Any]:
        """Prepares the model for training; `active` lists the clients in the lanes; the loop changes it in place."""

    def begin(self, lane: int, training: Training) -> None:
        """Puts a client's start into a lane."""

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Computes the gradients of the clients' next steps, `train.batch` rows of each at a time; counts the units."""

    def correct(self, lane: int, correct: Correct) -> None:
        """Applies a correction to a lane's gradient."""

    def clip(self, norm: float, /) -> None:
        """Clips each lane's gradient to an L2 norm; 0 leaves it alone."""

    def step(self, adjust: Callable[[], None]) -> None:
        """Takes the optimizer's step, and calls `adjust` before, as soon as the gradients are complete."""

    def end(self, lane: int, training: Training) -> Vector:
        """Returns the vector that a lane has reached, as `training.origin` asks."""

    def summed(self, value: float) -> float:
        """Adds a figure up over all ranks."""


def optimizer_step(backend: Backend, adjust: Callable[[], None]) -> None:
    """Takes the step of a backend whose gradients are complete."""
    adjust()
    backend.optimizer.step()


def take_steps(backend: Backend, trainings: Sequence[Training], train: Train) -> list[Trained]:
    """Trains all clients, as many at once as the backend has lanes; returns the results in the clients' order.

    A client that has taken its steps leaves its lane to the next. If none is waiting, the last lane moves up, so that
    the lanes in use stay side by side.
    """
    waiting, trained, active = iter(enumerate(trainings)), dict[int, Trained](), list[Progress]()

    def begun(lane: int, place: int, training: Training) -> Progress:
        restore(backend.optimizer, training.moments or {}, lane)
        backend.begin(lane, training)
        rows = training.rows.num_rows
        return Progress(place, training, backend.batches(rows, train, training.stream), steps_of(rows, train))

    def adjust() -> None:
        for lane, client in enumerate(active):
            if client.training.correct is not None:
                backend.correct(lane, client.training.correct)
        backend.clip(train.clip)

    with backend.prepared(active):
        for lane, (place, training) in zip(range(backend.lanes), waiting, strict=False):
            active.append(begun(lane, place, training))
        while active:
            backend.gradients(active, train)
            for lane, client in enumerate(active):
                step_factor = client.training.step_factor or train.over_steps.factor
                lr = train.optimizer.lr * client.training.round_factor * step_factor(client.taken, client.steps)
                backend.optimizer.param_groups[lane]["lr"] = lr
                client.taken, client.lr_sum = client.taken + 1, client.lr_sum + lr
            backend.step(adjust)
            for lane in reversed(range(len(active))):
                client = active[lane]
                if client.taken < client.steps:
                    continue
                metrics = client.metrics(backend.objective, backend.summed)
                moments = {} if client.training.moments is None else kept(backend.optimizer, lane)
                trained[client.place] = Trained(backend.end(lane, client.training), metrics, moments)
                if (following := next(waiting, None)) is not None:
                    active[lane] = begun(lane, *following)
                    continue
                last = active.pop()
                if lane < len(active):
                    active[lane] = last
                    move(backend.optimizer, len(active), lane)
    return [trained[place] for place in range(len(trainings))]
