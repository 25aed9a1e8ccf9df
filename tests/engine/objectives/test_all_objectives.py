"""What holds for every objective: pieces, lanes and privacy's rows change nothing, and the reference stays as it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.adapters import FullTuning, Lora
from engine.config.train import Sgd, Train
from engine.objectives.base import Objective, step_loss
from engine.objectives.cpo import Cpo, SimPo
from engine.objectives.distill import Distill
from engine.objectives.dpo import Dpo
from engine.objectives.kto import Kto
from engine.objectives.orpo import Orpo
from engine.objectives.reward import Reward
from engine.objectives.sft import Sft
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.training.step_loop import Trained, Training, batches
from strategies.privacy.accounting import Scheme
from strategies.privacy.budget import ExamplePlan
from strategies.privacy.noise import seeded_words

OBJECTIVES: list[Objective] = [
    Sft(),
    Dpo(),
    Dpo(loss_type=("ipo", "sft"), loss_weights=(1.0, 0.5), reference="start"),
    Dpo(loss_type="sigmoid_norm", reference="round"),
    Dpo(loss_type="hinge", reference="none"),
    Kto(),
    Kto(kl="round", undesirable_weight=1.5),
    Kto(kl="none"),
    Orpo(),
    Cpo(),
    SimPo(),
    Reward(center_rewards_coefficient=0.1),
    Distill(teacher="untied"),
]
ONE_STEP = Train(steps=1, batch=6, optimizer=Sgd(lr=1.0), clip=0)

Encoded = Callable[..., pa.RecordBatch]
MakeDouble = Callable[..., LocalTrainer]
Moved = Callable[..., torch.Tensor]


def named(objective: Objective) -> str:
    return f"{objective.kind}-{objective.reference}-{getattr(objective, 'kl', '')}"


@pytest.fixture(params=OBJECTIVES, ids=named)
def objective(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Objective:
    chosen: Objective = request.param
    return chosen.with_models([replace(model, model=str(bases[model.model])) for model in chosen.models])


def training(trainer: LocalTrainer, rows: pa.RecordBatch, moved: Moved, seed: int = 1, **options: Any) -> Training:
    """From a moved vector, beside the reference that the objective names."""
    references = {"start": moved(trainer, 8), "round": moved(trainer, 9)}
    reference = references.get(trainer.objective.reference)
    return Training(rows, moved(trainer), np.random.default_rng(seed), 0, reference=reference, **options)


def judged(trained: Trained) -> dict[str, float]:
    return {name: value for name, value in trained.metrics.items() if name != "tokens"}


@pytest.mark.parametrize("train", [replace(ONE_STEP, batch=2, accumulate=3, max_length=12), ONE_STEP])
def test_pieces_of_a_step_change_nothing(
    objective: Objective, make_double: MakeDouble, encoded: Encoded, moved: Moved, train: Train
) -> None:
    trainer, rows = make_double(objective, train), encoded(objective)
    ours = trainer.train([training(trainer, rows, moved)], train)[0]
    trainable = trainer.trainable
    # By hand: one batch, and the loss as the sum of its terms' means.
    trainable.network.eval()
    numbers = next(batches(rows.num_rows, train, np.random.default_rng(1)))
    batch = objective.collate(objective.step_rows(rows, numbers), 0)
    if objective.reference != "none":
        with trainer.as_reference(training(trainer, rows, moved).reference):
            batch = batch.plus(objective.reference_columns(trainable.network, batch, trainer.context))
    trainable.flat.data.copy_(moved(trainer))
    for name in objective.means:
        with torch.no_grad():
            term = objective.step_terms(trainable.network, batch, trainer.context)[name]
        batch = batch.plus({name: (term.total() / objective.counts(batch)[name]).expand(len(batch.ids_BT))})
    trainable.grad.zero_()
    terms = objective.terms(trainable.network, batch, trainer.context)
    totals = {name: term.total() for name, term in terms.items()}
    loss = step_loss(objective, totals, objective.counts(batch))
    loss.backward()
    assert trainable.grad.norm() > 1e-3
    torch.testing.assert_close(ours.end, moved(trainer) - trainable.grad, rtol=0, atol=1e-10)
    assert ours.metrics["loss"] == pytest.approx(loss.item(), abs=1e-10)


def test_a_client_in_lanes_is_the_same_client_alone(
    objective: Objective, make_double: MakeDouble, encoded: Encoded, moved: Moved
) -> None:
    """Clients of one, two and six rows, in pieces, so that lanes have padding and turns without a piece."""
    train = replace(ONE_STEP, steps=2, batch=2, accumulate=2)
    trainer, rows = make_double(objective, train), encoded(objective)
    parts = [rows.slice(0, 1), rows.slice(1, 2), rows]
    alone = [trainer.train([training(trainer, part, moved, seed)], train)[0] for seed, part in enumerate(parts)]
    together = LaneTrainer(trainer, 3, train).train(
        [training(trainer, part, moved, seed) for seed, part in enumerate(parts)], train
    )
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.end, expected.end, rtol=0, atol=1e-10)
        assert judged(ours) == pytest.approx(judged(expected), abs=1e-9)


@pytest.mark.parametrize("peft", [Lora(r=4, alpha=8), FullTuning()], ids=["lora", "full"])
def test_the_reference_leaves_the_model_as_it_was(
    objective: Objective, make_double: MakeDouble, encoded: Encoded, moved: Moved, peft: Lora | FullTuning
) -> None:
    trainer, rows = make_double(objective, ONE_STEP, peft), encoded(objective)
    vector, initial = moved(trainer), trainer.trainable.initial
    reference = initial if objective.reference == "base" and not peft.off_is_base else None
    trainer.become(vector)
    first = trainer.loss_terms(rows, 2, reference)
    assert torch.equal(trainer.trainable.flat.data, vector)
    assert trainer.loss_terms(rows, 2, reference) == first
    if objective.reference != "base":
        return
    batch = objective.collate(objective.step_rows(rows, np.arange(rows.num_rows)), 0)
    with trainer.as_reference(reference):
        ours = objective.reference_columns(trainer.trainable.network, batch, trainer.context)
    trainer.become(initial)
    with torch.no_grad():
        expected = objective.reference_columns(trainer.trainable.network, batch, trainer.context)
    for name, column in expected.items():
        torch.testing.assert_close(ours[name], column, rtol=0, atol=1e-12)


def test_a_rows_own_gradient_is_clipped(
    objective: Objective, make_double: MakeDouble, encoded: Encoded, moved: Moved
) -> None:
    """With a clip above all norms the private step is the mean of the rows' own steps, below them each has its norm."""
    if objective.couples_rows:
        return
    trainer, rows = make_double(objective, ONE_STEP), encoded(objective)
    each = []
    for row in range(rows.num_rows):
        trained = trainer.train([training(trainer, rows.slice(row, 1), moved)], ONE_STEP)[0]
        each.append(moved(trainer) - trained.end)
    norms = torch.stack(each).norm(dim=1)
    for clip in (1e6, 0.5 * norms[norms > 0].min().item()):
        plan = ExamplePlan(0.0, clip, Scheme("poisson", 1.0), 1e-5)
        private = PrivateTrainer(trainer, plan, seeded_words(np.random.default_rng(1)))
        step = moved(trainer) - private.train([training(trainer, rows, moved)], ONE_STEP)[0].end
        expected = torch.stack(
            [grad * min(1.0, clip / max(norm, 1e-12)) for grad, norm in zip(each, norms, strict=True)]
        ).mean(0)
        torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reference", ["base", "start"])
def test_the_reference_is_not_what_a_rule_has_merged_into_the_base(
    make_double: MakeDouble, encoded: Encoded, moved: Moved, reference: Any
) -> None:
    """Its numbers are the same bits after any number of merges, in lanes as alone; a round's reference has them."""
    trainer = make_double(Dpo(reference=reference), ONE_STEP)
    trainable, rows = trainer.trainable, encoded(Dpo())
    batch = Dpo().collate(rows, 0)

    def columns() -> torch.Tensor:
        with trainer.as_reference(moved(trainer, 8) if reference == "start" else None):
            return trainer.objective.reference_columns(trainable.network, batch, trainer.context)["reference"]

    before = columns()
    products = [pair.b_OR @ pair.a_RI for pair in trainable.layout.lora_pairs(moved(trainer))]
    delta = torch.cat([product.reshape(-1) for product in products]).float().numpy()
    for factor in (1.0, -3.0):
        trainable.use_merged(torch.from_numpy(trainable.merge_weights(factor * delta)))
        merged = [layer.weight.data_ptr() for layer in trainable.adapted_layers()]
        assert torch.equal(columns(), before)
        assert [layer.weight.data_ptr() for layer in trainable.adapted_layers()] == merged
        trainer.objective = Dpo(reference="round")
        assert not torch.equal(columns(), before)
        trainer.objective = Dpo(reference=reference)
