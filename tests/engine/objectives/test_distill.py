"""Distillation: worked numbers, TRL's divergence and gradient, and teachers that are refused."""

import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from engine.config.train import Train
from engine.messages.errors import RunError
from engine.objectives.distill import Distill, divergence
from engine.objectives.token_batch import Batch
from engine.training.local_training import LocalTrainer

T, S = (0.5, 0.5), (0.8, 0.2)
KL_TS = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
KL_ST = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
# Between the mean of both, 0.65 and 0.35, and each.
KL_TM = 0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35)
KL_SM = 0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35)


@pytest.mark.parametrize(("beta", "expected"), [(0, KL_TS), (1, KL_ST), (0.5, (KL_TM + KL_SM) / 2)])
def test_divergences_are_those_worked_by_hand(beta: float, expected: float) -> None:
    log_s, log_t = (torch.tensor([p], dtype=torch.float64).log() for p in (S, T))
    assert divergence(log_s, log_t, beta).item() == pytest.approx(expected, abs=1e-12)
    assert divergence(log_s, log_s, beta).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_loss_and_gradient_are_those_of_trl(
    make_double: Callable[..., LocalTrainer],
    encoded: Callable[..., pa.RecordBatch],
    moved: Callable[..., torch.Tensor],
    bases: dict[str, Path],
    beta: float,
) -> None:
    objective = Distill(teacher=str(bases["untied"]), beta=beta)
    trainer = make_double(objective, Train(steps=1))
    network, (teacher,) = trainer.trainable.network.eval(), trainer.context.models
    trainer.become(moved(trainer))
    batch: Batch = objective.collate(encoded(objective), 0)

    terms = objective.terms(network, batch, trainer.context)
    loss = terms["divergence"].total() / batch.learned
    trainer.trainable.grad.zero_()
    loss.backward()
    ours = trainer.trainable.grad.clone()

    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT}
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1]
    student_logits = network(**inputs).logits[:, :-1]
    theirs = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, batch.labels_BT[:, 1:], beta=beta)
    trainer.trainable.grad.zero_()
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert (ours - trainer.trainable.grad).norm() < 1e-5 * ours.norm()

    learned = batch.row_N, batch.place_N
    forward = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, batch.labels_BT[:, 1:], beta=0)
    assert terms["kl"].total().item() / batch.learned == pytest.approx(forward.item(), rel=1e-5)
    same = (student_logits[learned].argmax(1) == teacher_logits[learned].argmax(1)).double().mean()
    assert terms["agreement"].total().item() / batch.learned == pytest.approx(same.item())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    make_double: Callable[..., LocalTrainer],
    encoded: Callable[..., pa.RecordBatch],
    bases: dict[str, Path],
    beta: float,
) -> None:
    objective = Distill(teacher=str(bases["tied"]), beta=beta)
    terms = make_double(objective, Train(steps=1)).loss_terms(encoded(objective), 4)
    (total, count), (agreed, tokens) = terms["divergence"], terms["agreement"]
    assert total == pytest.approx(0, abs=1e-9) and agreed == tokens == count > 0


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(RunError, match="give a share of the teacher from 0 to 1"):
        Distill(teacher="tiny", beta=1.5)
