"""The step loop by hand: clients on a line, each pulled halfway to its own row in every step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.train import Schedule, Sgd, Train
from engine.objectives.base import BaseObjective
from engine.training.optimizers import clip, make_optimizer, move
from engine.training.step_loop import Correct, Progress, Training, batches, take_steps
from strategies.core.protocol import Vector

TRAIN = Train(epochs=1, batch=1, optimizer=Sgd(lr=0.5), clip=0)


class Line:
    """A backend whose vectors are single numbers w, and whose loss is (w - x)^2 / 2 for each row x."""

    objective: Any = SimpleNamespace(losses={"square": 1e9}, figures={}, step_rows=BaseObjective().step_rows)

    def __init__(self, lanes: int, train: Train = TRAIN) -> None:
        self.lanes = lanes
        self.flat_KP, self.grad_KP = torch.zeros(lanes, 1), torch.zeros(lanes, 1)
        self.rows = [torch.nn.Parameter(row) for row in self.flat_KP]
        self.optimizer = make_optimizer([{"params": [row]} for row in self.rows], train.optimizer)
        self.used: list[list[int]] = []  # the clients in the lanes, at each step

    def batches(self, rows: int, train: Train, rng: np.random.Generator) -> Iterator[np.ndarray]:
        return batches(rows, train, rng)

    def prepared(self, active: list[Progress]) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, lane: int, training: Training) -> None:
        self.flat_KP[lane].copy_(training.start)

    def gradients(self, active: list[Progress], train: Train) -> None:
        self.used.append([client.place for client in active])
        for lane, row in enumerate(self.rows):
            row.grad = self.grad_KP[lane] if lane < len(active) else None
        for lane, client in enumerate(active):
            gaps = self.flat_KP[lane] - torch.tensor(client.next_rows(self.objective)["x"].to_pylist())
            self.grad_KP[lane] = gaps.mean()
            client.count({"square": len(gaps)}, 10 * len(gaps))
            client.add({"square": gaps.square().sum() / 2})

    def correct(self, lane: int, correct: Correct) -> None:
        correct(self.grad_KP[lane, None], self.flat_KP[lane, None])

    def clip(self, norm: float) -> None:
        clip(self.grad_KP, norm)

    def step(self, adjust: Callable[[], None]) -> None:
        adjust()
        self.optimizer.step()

    def end(self, lane: int, training: Training) -> Vector:
        return self.flat_KP[lane].clone()

    def summed(self, value: float) -> float:
        return 2 * value  # as if a second rank had the same


def client(rows: int, x: float = 8.0, **options: object) -> Training:
    batch = pa.RecordBatch.from_pydict({"x": [x] * rows})
    return Training(batch, torch.zeros(1), np.random.default_rng(0), 0, **options)  # type: ignore[arg-type]


def test_clients_pass_through_lanes_and_keep_their_order() -> None:
    """Clients of 2, 1, 3 and 1 steps in two lanes: the first free lane takes the next, then the last lane moves up."""
    line = Line(2)
    trained = take_steps(line, [client(2, 8), client(1, 4), client(3, 16), client(1, 2)], TRAIN)
    assert [result.end.item() for result in trained] == [6, 2, 14, 1]  # x (1 - 1/2^steps)
    assert line.used == [[0, 1], [0, 2], [3, 2], [2]]
    assert [result.metrics["steps"] for result in trained] == [2, 1, 3, 1]


def test_the_correction_comes_before_clipping() -> None:
    def tenfold(grad_KP: torch.Tensor, params_KP: torch.Tensor) -> None:
        grad_KP *= 10

    clipped = Train(epochs=1, batch=1, optimizer=Sgd(lr=0.5), clip=20)
    both = take_steps(Line(2), [client(1, 8), client(1, 8, correct=tenfold)], clipped)
    assert [result.end.item() for result in both] == [4, 10]


def test_metrics_and_rates_by_hand() -> None:
    """Two steps from 0 towards 8, at rates 0.25 and 0.5: the losses are 32 and (8 - 2)^2 / 2 = 18."""
    train = Train(steps=2, batch=2, optimizer=Sgd(lr=1.0), clip=0, over_steps=Schedule(warmup=2))
    (trained,) = take_steps(Line(1, train), [client(2, 8, round_factor=0.5)], train)
    assert trained.end.item() == 2 + 0.5 * 6
    assert trained.metrics == {"loss": 2 * 25, "rows": 2, "steps": 2, "tokens": 2 * 40, "learned": 4, "rates": 0.75}


def test_the_optimizers_state_is_kept_if_asked_and_else_starts_from_nothing() -> None:
    train = Train(steps=2, batch=1, optimizer=Sgd(lr=0.5, momentum=0.5), clip=0)
    line = Line(1, train)
    first, second, third = (client(1, 8, moments=moments) for moments in ({}, None, {}))
    kept, dropped, again = take_steps(line, [first, second, third], train)
    assert kept.end.item() == dropped.end.item() == again.end.item() == 8  # 4, and then 4/2 + momentum 8/2 * 1/2
    assert dropped.moments == {} and kept.moments["momentum_buffer"].item() == -4 - 4
    resumed = take_steps(line, [client(1, 8, moments=kept.moments)], train)[0]
    assert resumed.end.item() == pytest.approx(0 + 0.5 * (8 + 4) + 0.5 * (2 + 6))


def test_a_lane_moves_with_its_state() -> None:
    line = Line(2, Train(steps=1, optimizer=Sgd(lr=0.5, momentum=0.5)))
    for lane, row in enumerate(line.rows):
        row.grad = torch.tensor([1.0 + lane])
    line.optimizer.step()
    move(line.optimizer, 1, 0)
    assert line.flat_KP[0].item() == -1.0
    assert line.optimizer.state[line.rows[0]]["momentum_buffer"].item() == 2.0
