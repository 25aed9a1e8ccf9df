"""Baselines and fine-tuning train by the recipe's schedules: a baseline stands for all rounds of a run."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from engine.config.federation import Federation
from engine.config.sections import Model
from engine.config.train import Schedule, Sgd, Train
from engine.messages.broadcast import BroadcastMessage
from engine.objectives.sft import Sft
from engine.training.step_loop import Progress, Training, batches, take_steps
from engine.workers.evaluator import Evaluator
from strategies.core.cohort import UniformCohort
from strategies.core.protocol import Broadcast


@dataclass
class Rates:
    """A trainer on one parameter that notes the learning rate of each step."""

    optimizer: torch.optim.Optimizer = field(
        default_factory=lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    )
    noted: list[float] = field(default_factory=list)
    lanes = 1
    device = torch.device("cpu")
    batches = staticmethod(batches)
    prepared = staticmethod(nullcontext)
    objective = Sft()
    summed = staticmethod(float)
    clip = staticmethod(float)
    train = take_steps

    def begin(self, lane: int, training: Training) -> None:
        """Needs no start."""

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Has none."""

    def step(self, adjust: Any) -> None:
        self.noted.append(self.optimizer.param_groups[0]["lr"])

    def loss_terms(self, rows: pa.RecordBatch, batch: int, *_: Any) -> dict[str, tuple[float, int]]:
        return {"nll": (0.0, 1)}

    def end(self, lane: int, training: Training) -> torch.Tensor:
        return training.start


@pytest.mark.parametrize(
    ("first", "steps", "rates"),
    [
        (0, 8, [1, 0.5, 0.75, 0.375, 0.5, 0.25, 0.25, 0.125]),  # two steps a round, of which the second has half
        (0, 2, [1, 0.5]),  # fewer than rounds: those of the first round and of the third
        (0, 5, [1, 0.5, 0.75, 0.5, 0.25]),  # the first round has one more
        (4, 4, [1, 0.75, 0.5, 0.25]),  # after the last round only the schedule of one training is left
    ],
)
def test_the_rates_of_a_training_for_all_rounds_by_hand(first: int, steps: int, rates: list[float]) -> None:
    train = Train(
        steps=1, batch=1, optimizer=Sgd(lr=2.0), over_rounds=Schedule("linear"), over_steps=Schedule("linear")
    )
    federation = Federation(name="x", seed=1, rounds=4, model=Model(), cohort=UniformCohort(size=1), train=train)
    rows = pa.RecordBatch.from_pydict({"row": list(range(9))})
    runner: Any = SimpleNamespace(
        federation=federation, rows_of=lambda client, split, message: rows, peers=SimpleNamespace(rank=None)
    )
    trainer: Any = Rates()
    message = BroadcastMessage.of(Broadcast(first, torch.zeros(1)))
    (loss,) = Evaluator(runner, trainer, None).local_only([3], message, [steps])
    assert loss.client == 3
    assert trainer.noted == pytest.approx([2 * rate for rate in rates])
