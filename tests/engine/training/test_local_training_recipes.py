"""What a recipe may ask of local training beside steps: accumulation, schedules, kept state, ranks, personal runs."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.federation import Federation
from engine.config.train import AdamW, Schedule, Sgd, Train
from engine.objectives.token_batch import token_losses
from engine.training.local_training import Job, LocalTrainer
from strategies.averaging.reweighting import QFedAvg
from strategies.core.protocol import Broadcast, ClientState, Update
from strategies.personalized.personal_models import Ditto

Training = Callable[..., Federation]
MakeTrainer = Callable[[Federation], LocalTrainer]


def started(trainer: LocalTrainer, round_: int = 0, lora_rank: int | None = None) -> Broadcast:
    """A broadcast whose LoRA B is not zero, so that every tensor has a gradient."""
    trainable = trainer.trainable
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(trainable.layout.size)).float()
    return Broadcast(round_, trainable.initial + 0.02 * noise, layout=trainable.layout, lora_rank=lora_rank)


def trained(
    make_trainer: MakeTrainer,
    federation: Federation,
    rows: pa.RecordBatch,
    broadcast: Broadcast | None = None,
    **client_state: ClientState,
) -> tuple[Update, ClientState]:
    trainer = make_trainer(federation)
    return trainer.updates(
        [Job(1, rows, 0.5, broadcast or started(trainer), client_state.get("client_state", {}))], federation
    )[0]


def test_rows_in_pieces_make_the_step_of_all_at_once(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    whole, _ = trained(make_trainer, training(Train(steps=3, batch=4, optimizer=Sgd(lr=0.1))), rows)
    pieces, _ = trained(make_trainer, training(Train(steps=3, batch=2, accumulate=2, optimizer=Sgd(lr=0.1))), rows)
    torch.testing.assert_close(pieces.delta, whole.delta, rtol=0, atol=1e-6)
    same = ("rows", "steps", "tokens", "learned")
    assert [pieces.metrics[name] for name in same] == [whole.metrics[name] for name in same]
    assert pieces.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)


def test_a_schedule_over_rounds_is_a_learning_rate_of_the_round(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    falling = Train(steps=2, batch=2, optimizer=Sgd(lr=0.1), over_rounds=Schedule(kind="linear"))
    federation = replace(training(falling), rounds=4)
    trainer = make_trainer(federation)
    broadcast = started(trainer, round_=3)  # a quarter of the rate is left
    update, _ = trainer.updates([Job(1, rows, 0.5, broadcast, {})], federation)[0]
    quarter = replace(training(Train(steps=2, batch=2, optimizer=Sgd(lr=0.025))), rounds=4)
    assert torch.equal(update.delta, trained(make_trainer, quarter, rows, broadcast)[0].delta)
    assert update.metrics["rates"] == pytest.approx(2 * 0.025)


def test_a_schedule_over_steps_by_hand(training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch) -> None:
    warm = Train(steps=4, batch=2, optimizer=Sgd(lr=0.1), over_steps=Schedule(kind="linear", warmup=2))
    update, _ = trained(make_trainer, training(warm), rows)
    assert update.metrics["rates"] == pytest.approx(0.1 * (0.5 + 1 + 1 + 0.5))


def test_a_client_goes_on_with_its_optimizer(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    kept = training(Train(steps=2, batch=5, optimizer=AdamW(lr=1e-2), state="keep", clip=0))
    trainer = make_trainer(kept)
    first, client_state = trainer.updates([Job(1, rows, 0.5, started(trainer), {})], kept)[0]
    assert {name.split(".")[2] for name in client_state} == {"step", "exp_avg", "exp_avg_sq"}
    trainer.updates([Job(2, rows.slice(0, 2), 0.5, started(trainer), {})], kept)[0]  # the slot becomes somebody else
    between = replace(started(trainer), params=started(trainer).params + first.delta)
    second, _ = trainer.updates([Job(1, rows, 0.5, between, client_state)], kept)[0]
    # All five rows are in each step, so that only the order within a batch differs from four steps at a stretch.
    through, _ = trained(make_trainer, training(Train(steps=4, batch=5, optimizer=AdamW(lr=1e-2), clip=0)), rows)
    torch.testing.assert_close(first.delta + second.delta, through.delta, rtol=0, atol=1e-5)
    anew, _ = trainer.updates([Job(1, rows, 0.5, between, {})], kept)[0]
    assert not torch.allclose(anew.delta, second.delta, atol=1e-4)


def test_a_client_of_a_lower_rank_trains_with_its_own_scale(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    federation = training(Train(steps=1, batch=5, optimizer=Sgd(lr=0.1), clip=0))
    trainer = make_trainer(federation)
    full = started(trainer)
    for pair in trainer.trainable.layout.lora_pairs(full.params):
        pair.a_RI[2:], pair.b_OR[:, 2:] = 0, 0
    low = replace(full, lora_rank=2)
    updates = {
        broadcast.lora_rank: trainer.updates([Job(1, rows, 0.5, broadcast, {})], federation)[0][0]
        for broadcast in (full, low, full)
    }
    for pair in trainer.trainable.layout.lora_pairs(updates[2].delta):
        assert not pair.a_RI[2:].any() and not pair.b_OR[:, 2:].any() and pair.b_OR[:, :2].any()
    assert updates[2].metrics["loss"] != updates[None].metrics["loss"]
    assert torch.equal(updates[None].delta, trained(make_trainer, federation, rows, full)[0].delta)


def test_a_personal_run_is_trained_beside_the_global_one(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    train = Train(steps=3, batch=2, optimizer=Sgd(lr=0.1))
    plain, nothing = trained(make_trainer, training(train), rows)
    ditto, client_state = trained(make_trainer, training(train, strategy=Ditto(lam=0.5)), rows)
    assert torch.equal(ditto.delta, plain.delta) and ditto.metrics == plain.metrics
    assert nothing == {} and set(client_state) == {"strategy.personal"}
    tighter = trained(make_trainer, training(train, strategy=Ditto(lam=5.0)), rows)[1]
    assert not torch.equal(client_state["strategy.personal"], tighter["strategy.personal"])
    trainer = make_trainer(training(train))
    assert not torch.equal(client_state["strategy.personal"], started(trainer).params + plain.delta)


def test_the_loss_before_is_that_of_all_rows(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    federation = training(Train(steps=1, batch=2, optimizer=Sgd(lr=0.1)), strategy=QFedAvg())
    trainer = make_trainer(federation)
    update, _ = trainer.updates([Job(1, rows, 0.5, started(trainer), {})], federation)[0]
    trainer.trainable.flat.data.copy_(started(trainer).params)
    trainer.trainable.network.eval()
    with torch.no_grad():
        batch = trainer.objective.collate(rows, 0)
        nll = token_losses(trainer.trainable.network, batch).mean()
    assert update.metrics["loss_before"] == pytest.approx(nll.item(), rel=1e-5)
