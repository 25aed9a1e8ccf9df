"""Distillation: worked numbers, TRL's divergence and gradient, and teachers that are refused."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.objectives.distill import Distill, divergence
from engine.objectives.sampling import Completion
from engine.objectives.token_batch import Batch
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training
from strategies.core.seeds import sample_key

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
    for name in ("beta", "lmbda"):
        with pytest.raises(RunError, match=rf"train\.objective\.{name} is 1\.5: give a share from 0 to 1"):
            Distill(teacher="tiny", **{name: 1.5})


def test_own_completions_take_the_place_of_given_ones(encoded: Callable[..., pa.RecordBatch]) -> None:
    objective = Distill(teacher="tiny", lmbda=0.5)
    rows = pa.record_batch(
        {
            "input_ids": pa.array([[5, 6, 7, 8], [5, 6, 7, 8, 9], [7, 8]], pa.list_(pa.int32())),
            "mask": pa.array([[0, 0, 1, 1], [0, 1, 0, 1, 1], [1, 1]], pa.list_(pa.int8())),  # the second of two turns
            "room": pa.array([6, 2, 8], pa.int32()),
        }
    )
    assert [ids.tolist() for ids in objective.prompt_ids(rows)] == [[5, 6], [5, 6, 7], []]
    sampled = [Completion(np.array(ids, np.int64), np.zeros(len(ids)), ended=False) for ids in ([], [11, 12, 13], [])]
    made = objective.completed(rows, sampled, None).to_pylist()
    assert made[0] == {"input_ids": [5, 6, 7, 8], "mask": [0, 0, 1, 1]}
    assert made[1] == {"input_ids": [5, 6, 7, 11, 12], "mask": [0, 0, 0, 1, 1]}
    assert made[2] == {"input_ids": [7, 8], "mask": [1, 1]}
    assert encoded(objective)["room"].to_pylist()[0] == 64  # the prompt is empty


def trained_on(trainer: LocalTrainer, train: Train, start: torch.Tensor, rows: pa.RecordBatch) -> torch.Tensor:
    return trainer.train([Training(rows, start, np.random.default_rng(1), 0)], train)[0].end


def test_a_step_on_own_completions_is_one_on_these_rows(
    make_double: Callable[..., LocalTrainer],
    encoded: Callable[..., pa.RecordBatch],
    moved: Callable[..., torch.Tensor],
    bases: dict[str, Path],
) -> None:
    train = Train(steps=1, batch=6, optimizer=Sgd(lr=1.0), clip=0)
    options = {"teacher": str(bases["untied"]), "max_completion_length": 5}
    always, some, given = (Distill(lmbda=share, **options) for share in (1.0, 0.5, 0.0))
    trainer, rows = make_double(always, train), encoded(always)
    start = moved(trainer)
    trainer.become(start)
    completed = trainer.sampler.completed(rows, partial(sample_key, 0, 0, 0, 0), 1, 6)
    assert completed["input_ids"][0] == rows["input_ids"][0]  # without a prompt
    assert all(completed["input_ids"][row] != rows["input_ids"][row] for row in range(1, 6))
    expected = trained_on(make_double(given, train), train, start, completed)
    ours = trained_on(trainer, train, start, rows)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    others = [trained_on(make_double(objective, train), train, start, rows) for objective in (given, some)]
    apart = 0.05 * (ours - start).norm()
    assert all((other - ours).norm() > apart for other in others) and (others[0] - others[1]).norm() > apart


def test_own_completions_of_lanes_are_those_of_each_alone(
    make_double: Callable[..., LocalTrainer],
    encoded: Callable[..., pa.RecordBatch],
    moved: Callable[..., torch.Tensor],
    bases: dict[str, Path],
) -> None:
    train = Train(steps=2, batch=2, accumulate=2, optimizer=Sgd(lr=0.5), clip=0)
    objective = Distill(teacher=str(bases["untied"]), lmbda=0.5, max_completion_length=5)
    trainer, rows = make_double(objective, train), encoded(objective)
    parts = [rows.slice(1, 1), rows.slice(2, 3), rows]
    keys = [partial(sample_key, 0, 0, client) for client in range(3)]

    def trainings() -> list[Training]:
        pairs = zip(parts, keys, strict=True)
        return [Training(part, moved(trainer), np.random.default_rng(1), 0, keys=key) for part, key in pairs]

    alone = [trainer.train([each], train)[0].end for each in trainings()]
    together = [trained.end for trained in LaneTrainer(trainer, 3, train).train(trainings(), train)]
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
