"""The door for objectives: a loss of two terms is the same in pieces, in lanes, and row by row under privacy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from engine.config.federation import Federation
from engine.config.sections import Evaluate
from engine.config.train import Sgd, Train
from engine.objectives.base import (
    Context,
    Term,
    client_figures,
    counted,
    figure_bounds,
    figure_metrics,
    step_loss,
    term_sums,
)
from engine.objectives.sft import Sft
from engine.objectives.token_batch import Batch
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.training.step_loop import Trained, Training
from engine.workers.evaluator import ClientLoss, client_loss, pooled


@dataclass(frozen=True)
class TwoTerms(Sft):
    """SFT, and a term that has one unit a row: half the square of the row's summed loss, over 100."""

    losses: ClassVar[Mapping[str, float]] = {**Sft.losses, "square": 1000.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {**super().counts(batch), "square": len(torch.unique(batch.row_N))}

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        terms = super().terms(network, batch, context)
        row_U = torch.unique(batch.row_N)  # not the rows that only fill a lane
        return {**terms, "square": Term(terms["nll"].by_row(len(batch.ids_BT))[row_U].square() / 200, row_U)}


@pytest.fixture
def make_two(make_trainer: Callable[..., LocalTrainer], federation: Federation) -> Callable[[Train], LocalTrainer]:
    def made(train: Train) -> LocalTrainer:
        trainer = make_trainer(replace(federation, train=train))
        trainer.objective = TwoTerms()
        return trainer

    return made


def start_of(trainer: LocalTrainer) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(trainer.trainable.layout.size)).float()
    return trainer.trainable.initial + 0.02 * noise


def step(trainer: Any, start: torch.Tensor, rows: pa.RecordBatch, train: Train) -> Trained:
    return trainer.train([Training(rows, start, np.random.default_rng(1), 0)], train)[0]


def by_hand(trainer: LocalTrainer, rows: pa.RecordBatch) -> tuple[torch.Tensor, float]:
    """The loss and its gradient, from each row's summed loss alone."""
    trainable = trainer.trainable
    trainable.flat.data.copy_(start_of(trainer))
    trainable.network.train()
    trainable.grad.zero_()
    batches = [Sft().collate(rows.slice(i, 1), 0) for i in range(rows.num_rows)]
    sums = torch.stack([Sft().terms(trainable.network, batch, Context())["nll"].total() for batch in batches])
    loss = sums.sum() / sum(batch.learned for batch in batches) + sums.square().mean() / 200
    loss.backward()
    return trainable.grad.clone(), loss.item()


ONE_STEP = Train(steps=1, batch=5, optimizer=Sgd(lr=1.0), clip=0)


@pytest.mark.parametrize("train", [ONE_STEP, replace(ONE_STEP, batch=1, accumulate=5, max_length=8)])
def test_each_term_is_its_sum_over_its_count_in_the_whole_step(
    make_two: Callable[[Train], LocalTrainer], rows: pa.RecordBatch, train: Train
) -> None:
    trainer = make_two(train)
    gradient, loss = by_hand(trainer, rows)
    start = start_of(trainer)
    trained = step(trainer, start, rows, train)
    torch.testing.assert_close(start - trained.end, gradient, rtol=1e-4, atol=1e-6)
    assert trained.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert trained.metrics["learned"] == trained.metrics["units.nll"] == Sft().collate(rows, 0).learned
    assert trained.metrics["units.square"] == 5
    assert trained.metrics["term.nll"] + trained.metrics["term.square"] == pytest.approx(loss, rel=1e-5)
    trainer.become(start)
    assert sum(total / count for total, count in trainer.loss_terms(rows, 2).values()) == pytest.approx(loss, rel=1e-5)


def test_lanes_train_a_loss_of_several_terms(make_two: Callable[[Train], LocalTrainer], rows: pa.RecordBatch) -> None:
    """Clients of one, two and five rows, in pieces, so that lanes have padding and turns without a piece."""
    train = replace(ONE_STEP, batch=2, accumulate=3)
    trainer = make_two(train)
    lanes, start = LaneTrainer(trainer, 3, train), start_of(trainer)
    parts = [rows.slice(0, 1), rows.slice(1, 2), rows]
    alone = [step(trainer, start, part, train) for part in parts]
    together = lanes.train([Training(part, start, np.random.default_rng(1), 0) for part in parts], train)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.end, expected.end, rtol=0, atol=1e-5)
        assert ours.metrics == pytest.approx(expected.metrics, rel=1e-5)


def test_privacy_clips_the_gradient_of_a_rows_own_terms(
    make_private: Callable[..., PrivateTrainer], make_two: Callable[[Train], LocalTrainer], rows: pa.RecordBatch
) -> None:
    private = make_private(clip=0.05, train=ONE_STEP, objective=TwoTerms())
    other = make_two(ONE_STEP)
    gradients = [by_hand(other, rows.slice(i, 1))[0] for i in range(rows.num_rows)]
    assert all(gradient.norm() > 0.05 for gradient in gradients)
    expected = torch.stack([0.05 * gradient / gradient.norm() for gradient in gradients]).mean(0)
    start = start_of(other)
    moved = start - step(private, start, rows, ONE_STEP).end
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_terms_by_hand() -> None:
    term = Term(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]))
    assert (
        term.total() == 7 and term.by_row(4).tolist() == [1, 0, 6, 0] and term.counts_by_row(4).tolist() == [1, 0, 2, 0]
    )
    totals = {"a": torch.tensor(6.0), "b": torch.tensor(-1.0)}
    objective: Any = SimpleNamespace(losses={"a": 1.0, "b": 1.0})
    assert step_loss(objective, totals, {"a": 3, "b": 4}).item() == 1.75
    assert step_loss(objective, {**totals, "b": torch.tensor(0.0)}, {"a": 3, "b": 0}).item() == 2


def test_held_out_sums_are_those_of_any_pieces(make_two: Callable[[Train], LocalTrainer], rows: pa.RecordBatch) -> None:
    trainer = make_two(ONE_STEP)
    objective, network = trainer.objective, trainer.trainable.network.eval()
    whole = term_sums(objective, network, [(objective.collate(rows, 0), 1)], Context())
    pieces = [(objective.collate(rows.slice(i, 1), 0), 1) for i in range(5)]
    assert counted(objective, [piece for piece, _ in pieces]) == {name: count for name, (_, count) in whole.items()}
    repeated = [*pieces, (pieces[0][0], 0)]  # what a rank without rows does to keep step
    for name, (total, count) in term_sums(objective, network, repeated, Context()).items():
        assert (total, count) == (pytest.approx(whole[name][0], rel=1e-5), whole[name][1])
    judged = client_loss(trainer, 3, rows, Evaluate(batch=2), 0)
    assert judged.rows == 5 and judged.terms["nll"] == (pytest.approx(whole["nll"][0], rel=1e-5), whole["nll"][1])
    other = ClientLoss(2, {"nll": (6.0, 3), "square": (1.0, 2)}, 1)
    both = pooled([ClientLoss(3, {"nll": (1.0, 4), "square": (2.0, 1)}, 2), other], objective)
    assert both.metrics("loss", objective) == {"loss": 1.0, "tokens": 7, "loss.nll": 1.0, "loss.square": 1.0}
    assert math.isnan(pooled([], objective).metrics("loss", objective)["loss"])


@dataclass(frozen=True)
class OfLongRows(Sft):
    """SFT in two terms, of the rows with more and with fewer than six learned tokens: a step may lack one of them."""

    losses: ClassVar[Mapping[str, float]] = {"long": 64.0, "short": 64.0}
    figures: ClassVar[Mapping[str, float]] = {"nll": 64.0}
    heldout: ClassVar[str] = "nll"

    def counts(self, batch: Batch) -> dict[str, int]:
        long = int((torch.bincount(batch.row_N)[batch.row_N] > 5).sum())
        return {"long": long, "short": batch.learned - long, "nll": batch.learned}

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        term = super().terms(network, batch, context)["nll"]
        long_N = torch.bincount(batch.row_N)[batch.row_N] > 5
        parts = {"long": long_N, "short": ~long_N}
        return {"nll": term, **{k: Term(term.values_N[mask], term.row_N[mask]) for k, mask in parts.items()}}


@pytest.mark.parametrize("kind", ["plain", "lanes", "private"])
def test_a_term_without_units_in_a_step_counts_nothing_and_a_figure_never_trains(
    make_two: Callable[[Train], LocalTrainer],
    make_private: Callable[..., PrivateTrainer],
    rows: pa.RecordBatch,
    kind: str,
) -> None:
    """Rows are trained as by SFT if all are short; their clients report 0 units of the other term."""
    plain, sft = make_two(ONE_STEP), make_two(ONE_STEP)
    plain.objective, sft.objective = OfLongRows(), Sft()
    start, short = start_of(plain), rows.slice(2, 1)
    assert plain.objective.counts(plain.objective.collate(short, 0))["long"] == 0
    options = {"clip": 1e6, "train": ONE_STEP}
    trainer: Any = plain
    if kind == "private":
        trainer, sft = make_private(objective=OfLongRows(), **options), make_private(**options)  # type: ignore[assignment]
    if kind == "lanes":
        trainer = LaneTrainer(plain, 2, ONE_STEP)
        trained = trainer.train([Training(short, start, np.random.default_rng(1), 0)] * 2, ONE_STEP)[1]
    else:
        trained = step(trainer, start, short, ONE_STEP)
    expected = step(sft, start, short, ONE_STEP)
    torch.testing.assert_close(trained.end, expected.end, rtol=0, atol=1e-6)
    assert (trained.metrics["term.long"], trained.metrics["units.long"]) == (0, 0)
    assert trained.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
    assert trained.metrics["term.nll"] == pytest.approx(trained.metrics["term.short"])


def test_sums_over_clients_give_each_terms_mean() -> None:
    """Two clients: nll 2 over 3 tokens and 1 over 6 is 12 / 9; only one has a unit of the square."""
    first = {
        "loss": 3.0,
        "learned": 3.0,
        "term.nll": 2.0,
        "units.nll": 3.0,
        "term.square": 1.0,
        "units.square": 2.0,
        "tokens": 5.0,
    }
    second = {**first, "term.nll": 1.0, "units.nll": 6.0, "term.square": 0.0, "units.square": 0.0, "tokens": 7.0}
    figures = [client_figures(TwoTerms(), metrics) for metrics in (first, second)]
    assert figures[0] == {"term.nll": 6, "units.nll": 3, "term.square": 2, "units.square": 2, "tokens": 5}
    sums = {name: figures[0][name] + figures[1][name] for name in figures[0]}
    assert figure_metrics(TwoTerms(), sums) == {"loss": 12 / 9 + 1, "tokens": 12, "term.nll": 12 / 9, "term.square": 1}
    assert figure_bounds(TwoTerms(), 10) == {
        "term.nll": 640,
        "units.nll": 10,
        "term.square": 1e4,
        "units.square": 10,
        "tokens": 10,
    }
    alone = client_figures(Sft(), {"loss": 2.0, "learned": 4.0, "tokens": 6.0})
    assert alone == {"term.nll": 8, "units.nll": 4, "tokens": 6} and figure_metrics(Sft(), alone) == {
        "loss": 2,
        "tokens": 6,
    }
