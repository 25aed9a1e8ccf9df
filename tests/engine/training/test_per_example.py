from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.adapters import FullTuning, Lora
from engine.config.federation import Federation
from engine.config.sections import Model
from engine.config.train import Sgd, Train
from engine.models.base_model import map_base, read_base
from engine.models.trainable import Trainable
from engine.objectives.token_batch import token_losses
from engine.training.local_training import Job, LocalTrainer
from engine.training.per_example import PrivateTrainer, row_gradients, samples
from engine.training.step_loop import Trained, Training
from strategies.averaging.reweighting import QFedAvg
from strategies.core.protocol import Broadcast
from strategies.privacy.noise import normal, seeded_words

ONE_STEP = Train(steps=1, batch=2, accumulate=3, optimizer=Sgd(lr=1.0))  # all five rows, in pieces of 2, 2 and 1

MakePrivate = Callable[..., PrivateTrainer]


def start_of(trainer: LocalTrainer | PrivateTrainer) -> torch.Tensor:
    """A vector whose LoRA B is not zero, so that every tensor has a gradient."""
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(trainer.trainable.layout.size)).float()
    return trainer.trainable.initial + 0.02 * noise


def steps(
    trainer: LocalTrainer | PrivateTrainer,
    rows: pa.RecordBatch,
    start: torch.Tensor,
    train: Train,
    seed: int,
    **options: Any,
) -> Trained:
    """Trains one client on these rows."""
    return trainer.train([Training(rows, start, np.random.default_rng(seed), 0, **options)], train)[0]


def change(trainer: PrivateTrainer, rows: pa.RecordBatch, train: Train = ONE_STEP, **options: Any) -> torch.Tensor:
    """What steps on these rows change of the vector (P,)."""
    start = start_of(trainer)
    return steps(trainer, rows, start, train, 9, **options).end - start


def by_hand(trainer: PrivateTrainer, rows: pa.RecordBatch) -> torch.Tensor:
    """Each row's gradient of its mean loss, by a backward pass of its own (B, P)."""
    trainable, each = trainer.trainable, []
    trainable.flat.data.copy_(start_of(trainer))
    trainable.network.train()
    for row in range(rows.num_rows):
        trainable.grad.zero_()
        token_losses(trainable.network, trainer.objective.collate(rows.slice(row, 1), 0)).mean().backward()
        each.append(trainable.grad.clone())
    return torch.stack(each)


@pytest.mark.parametrize(
    ("base", "peft"),
    [("tied", Lora(r=4, alpha=8)), ("gpt2", Lora(r=4, alpha=8)), ("untied", FullTuning())],
    ids=["lora", "lora on gpt2", "full"],
)
def test_rows_gradients_are_those_of_a_loop_over_rows(
    make_private: MakePrivate, rows: pa.RecordBatch, base: str, peft: Lora | FullTuning
) -> None:
    trainer = make_private(base=base, peft=peft)
    trainable, piece = trainer.trainable, trainer.objective.collate(rows, 0)
    trainable.flat.data.copy_(start_of(trainer))
    trainable.network.train()
    with row_gradients(trainable.network):
        token_losses(trainable.network, piece, every_logit=True).sum().backward()
        trained = [p for p in trainable.network.parameters() if p.requires_grad]
        summed_BP = torch.cat([p.grad_sample.flatten(1) for p in trained], dim=1)
    expected_BP = by_hand(trainer, rows)
    learned_B = (piece.labels_BT[:, 1:] != -100).sum(1)
    assert all(expected_BP.any(dim=1))
    torch.testing.assert_close(summed_BP / learned_B[:, None], expected_BP, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 6])
def test_each_row_is_clipped_by_itself(make_private: MakePrivate, rows: pa.RecordBatch, batch: int) -> None:
    rows_BP = by_hand(make_private(), rows)
    norms_B = rows_BP.norm(dim=1)
    clip = norms_B.median().item()
    assert (norms_B > 1.01 * clip).any() and (norms_B < 0.99 * clip).any()
    expected = (rows_BP * (clip / norms_B).clamp(max=1)[:, None]).sum(0) / 5
    train = replace(ONE_STEP, batch=batch, accumulate=6 // batch)
    torch.testing.assert_close(change(make_private(clip=clip), rows, train), -expected, rtol=1e-4, atol=1e-6)


def test_a_row_moves_the_sum_by_its_clipped_gradient_alone(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    clip = 1e-2  # below all norms
    train = replace(ONE_STEP, batch=8, accumulate=1)
    with_it, without = change(make_private(clip=clip), rows, train), change(make_private(clip=clip), rows[1:], train)
    assert (5 * with_it - 4 * without).norm().item() == pytest.approx(clip, rel=1e-3)


def test_without_noise_and_clipping_it_is_sgd_on_the_mean_of_the_rows_means(
    make_private: MakePrivate, rows: pa.RecordBatch
) -> None:
    train = Train(steps=3, batch=5, optimizer=Sgd(lr=0.3))
    delta = change(make_private(train=train), rows, train)
    other = make_private(train=train)
    parameters = [p for p in other.trainable.network.parameters() if p.requires_grad]
    reference, start = torch.optim.SGD(parameters, lr=0.3), start_of(other)
    other.trainable.flat.data.copy_(start)
    other.trainable.network.train()
    for _ in range(3):
        reference.zero_grad(set_to_none=False)
        for row in range(5):
            batch = other.objective.collate(rows.slice(row, 1), 0)
            (token_losses(other.trainable.network, batch).mean() / 5).backward()
        reference.step()
    assert delta.any()
    torch.testing.assert_close(delta, other.trainable.flat.detach() - start, rtol=1e-4, atol=1e-5)


def test_noise_comes_from_the_words_after_clipping_and_before_the_correction(
    make_private: MakePrivate, rows: pa.RecordBatch
) -> None:
    clip, z = 1e-2, 3.0
    silent, noisy = change(make_private(0.0, clip), rows), change(make_private(z, clip), rows)
    noise = torch.from_numpy(normal(seeded_words(np.random.default_rng(11)), len(noisy))).float()
    torch.testing.assert_close(noisy - silent, -noise * z * clip / 5, rtol=1e-3, atol=1e-6)
    corrected = change(make_private(z, clip), rows, correct=lambda grad_KP, params_KP: grad_KP.zero_().add_(2.0))
    torch.testing.assert_close(corrected, torch.full_like(corrected, -2.0))


def test_an_empty_sample_is_a_step_of_noise_of_the_right_size(
    make_private: MakePrivate, rows: pa.RecordBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateTrainer, "batches", lambda *_: iter([np.arange(0)]))
    trainer, train = make_private(z=2.0, clip=0.5), replace(ONE_STEP, batch=2, accumulate=1)
    start = start_of(trainer)
    trained = steps(trainer, rows, start, train, 0)
    metrics, noise = trained.metrics, trained.end - start
    count = len(noise)
    assert noise.var().item() == pytest.approx((2.0 * 0.5 / 2) ** 2, rel=5 * (2 / count) ** 0.5)
    assert abs(noise.mean().item()) < 5 * 0.5 / count**0.5
    assert (metrics["loss"], metrics["tokens"], metrics["learned"], metrics["steps"]) == (0, 0, 0, 1)


def test_each_row_is_drawn_by_itself_with_the_rate() -> None:
    rows, steps = 30, 4000
    train = Train(steps=steps, batch=3, accumulate=2)
    drawn_SR = np.zeros((steps, rows))
    for step, picked in enumerate(samples(rows, train, np.random.default_rng(3))):
        drawn_SR[step, picked] = 1
    error = (0.2 * 0.8 / steps) ** 0.5
    assert np.all(abs(drawn_SR.mean(0) - 0.2) < 5 * error)
    assert abs(np.corrcoef(drawn_SR.T)[~np.eye(rows, dtype=bool)]).max() < 5 / steps**0.5
    assert drawn_SR.sum(1).var() == pytest.approx(rows * 0.2 * 0.8, rel=0.15)
    assert drawn_SR.sum(1).min() == 0


def test_no_more_rows_than_a_step_takes_are_all_drawn_each_time() -> None:
    for rows in (1, 5, 6):
        drawn = list(samples(rows, Train(epochs=2, batch=3, accumulate=2), np.random.default_rng(3)))
        assert [picked.tolist() for picked in drawn] == 2 * [list(range(rows))]


def test_metrics_are_those_of_plain_training(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    train = replace(ONE_STEP, steps=2, optimizer=Sgd(lr=0.0))
    private, plain = make_private(train=train), make_private(train=train).plain
    start = start_of(private)
    trained, expected = (steps(trainer, rows, start, train, 0, round_factor=0.5) for trainer in (private, plain))
    assert trained.metrics == pytest.approx(expected.metrics, rel=1e-5)


def test_the_loss_before_is_that_of_plain_training(
    federation: Federation, make_private: MakePrivate, rows: pa.RecordBatch
) -> None:
    federation = replace(federation, train=ONE_STEP, strategy=QFedAvg())
    private, other = make_private(1.0, 0.1), make_private()
    job = Job(1, rows, 0.5, Broadcast(2, start_of(other)), {})
    before, expected = (t.updates([job], federation)[0][0].metrics for t in (private, other.plain))
    assert before["loss_before"] == expected["loss_before"] > 0


def test_the_clip_of_plain_training_is_left_out(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    deltas = [change(make_private(1.0, 0.1), rows, replace(ONE_STEP, clip=clip)) for clip in (0.0, 1e-6)]
    assert torch.equal(*deltas)


def test_what_a_lower_rank_does_not_have_stays_zero(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    trainer = make_private(1.0, 0.1)
    layout, start = trainer.trainable.layout, start_of(trainer)
    for pair in layout.lora_pairs(start):
        pair.a_RI[2:] = 0
        pair.b_OR[:, 2:] = 0
    for pair in layout.lora_pairs(steps(trainer, rows, start, replace(ONE_STEP, steps=3), 0, lora_rank=2).end):
        assert pair.a_RI[:2].all() and pair.b_OR[:, :2].all()
        assert not pair.a_RI[2:].any() and not pair.b_OR[:, 2:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(bases: dict[str, Path], rows: pa.RecordBatch, make_private: MakePrivate) -> None:
    model = Model(base=str(bases["tied"]), peft=Lora(r=4, alpha=8))
    packed, buffer = read_base(model)
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer).cuda()), model, 3)
    on_cpu = make_private(1.0, 0.1)
    words = seeded_words(np.random.default_rng(11))
    trainer = PrivateTrainer(LocalTrainer(trainable, 0, ONE_STEP), on_cpu.plan, words)
    start = start_of(on_cpu)
    end = steps(trainer, rows, start.cuda(), ONE_STEP, 9).end.cpu()
    torch.testing.assert_close(end - start, change(on_cpu, rows), rtol=1e-3, atol=1e-4)
