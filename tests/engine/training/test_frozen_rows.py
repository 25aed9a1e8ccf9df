"""Example-level privacy where a rule freezes coordinates: norm, clip and noise are of what is trained alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config.privacy import Privacy
from engine.config.train import Sgd, Train
from engine.objectives.base import Term
from engine.objectives.token_batch import token_losses
from engine.training.local_training import Job, _trainings
from strategies.core.layout import LORA_A, LORA_B
from strategies.core.lora_algebra import slices
from strategies.core.protocol import Broadcast
from strategies.lora.frozen_half import FfaLora, RoLora
from strategies.lora.hetlora import HetLora
from strategies.personalized.personal_models import FedDpa, FedSaLora
from strategies.privacy.budget import ExampleDp


@pytest.fixture
def rule_of_rows(federation, make_private, rows):
    """Trains one client with example-level noise; gives start and end of the training of `model`, and the trainer."""

    def trained(strategy, z, clip, model="global", state=None, round_=0, lora_rank=None):
        recipe = replace(federation, strategy=strategy, privacy=Privacy(dp=ExampleDp(noise_multiplier=1.0)))
        recipe = replace(recipe, train=Train(steps=1, batch=8, optimizer=Sgd(lr=1.0)))
        trainer = make_private(z, clip)
        layout = trainer.trainable.layout
        noise = torch.from_numpy(np.random.default_rng(5).standard_normal(layout.size)).float()
        broadcast = Broadcast(round_, trainer.trainable.initial + 0.02 * noise, layout=layout, lora_rank=lora_rank)
        training = _trainings(Job(1, rows, 1.0, broadcast, state or {}), recipe, trainer.device, None, view=False)[
            model
        ]
        (result,) = trainer.train([training], recipe.train)
        return training.start, result.end, trainer

    return trained


def by_hand(trainer, start, rows, trained_mask):
    """The mean of the rows' gradients on trained coordinates, each clipped to 0.01, by a backward pass for each."""
    trainable, total = trainer.trainable, torch.zeros(trainer.trainable.layout.size)
    trainable.flat.data.copy_(start)
    for row in range(rows.num_rows):
        trainable.grad.zero_()
        token_losses(trainable.network, trainer.objective.collate(rows.slice(row, 1), 0)).mean().backward()
        grad = trainable.grad * trained_mask
        total += grad * min(1.0, 0.01 / grad.norm().item())
    return total / rows.num_rows


@pytest.mark.parametrize(
    ("strategy", "round_", "trained"),
    [
        (FfaLora(), 0, [LORA_B]),
        (RoLora(), 0, [LORA_B]),
        (RoLora(), 1, [LORA_A]),
        (FedSaLora(), 0, [LORA_A, LORA_B]),  # keeps B at home, and trains it on the same rows
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_a_rows_gradient_is_clipped_by_its_norm_on_what_is_trained(
    rule_of_rows, make_private, rows, strategy, round_, trained
):
    start, end, trainer = rule_of_rows(strategy, 0.0, 0.01, round_=round_)
    layout = trainer.trainable.layout
    trained_mask = torch.zeros(layout.size, dtype=torch.bool)
    for marker in trained:
        for part in slices(layout, marker):
            trained_mask[part] = True
    expected = by_hand(make_private(), start, rows, trained_mask)
    torch.testing.assert_close(start - end, expected, rtol=1e-3, atol=1e-7)
    assert torch.equal(start[~trained_mask], end[~trained_mask])


@pytest.mark.parametrize("model", ["global", "personal"])
def test_each_training_of_feddpa_clips_and_adds_noise_to_its_own_half(rule_of_rows, make_private, rows, model):
    start, end, trainer = rule_of_rows(FedDpa(), 0.0, 0.01, model)
    layout = trainer.trainable.layout
    trained_mask = torch.zeros(layout.size)
    half = slice(2) if model == "global" else slice(2, None)
    for pair in layout.lora_pairs(trained_mask):
        pair.a_RI[half], pair.b_OR[:, half] = 1, 1
    expected = by_hand(make_private(), start, rows, trained_mask)
    torch.testing.assert_close(start - end, expected, rtol=1e-3, atol=1e-7)
    start, end, _ = rule_of_rows(FedDpa(), 1.0, 0.5, model)
    assert torch.equal(start[trained_mask == 0], end[trained_mask == 0]) and (start != end)[trained_mask == 1].all()


def test_the_norm_by_hand(make_private):
    """A gradient of 3 in a frozen and 4 in a trained coordinate: 4 is clipped to 2, and not 5 to 2, leaving 1.6."""
    trainer = make_private(0.0, 2.0)
    layout = trainer.trainable.layout
    frozen, trained_at = slices(layout, LORA_A)[0].start, slices(layout, LORA_B)[0].start
    grad = torch.zeros(layout.size)
    grad[frozen], grad[trained_at] = 3.0, 4.0
    each = {name: view[None].clone() for name, view in layout.views(grad).items()}
    trainer._each_row = lambda rows, group: each
    nll = sum((parameter * each[name][0]).sum() for name, parameter in _named(trainer, layout).items())
    trainer.trained_mask = torch.ones(layout.size, dtype=torch.bool)
    for part in slices(layout, LORA_A):
        trainer.trained_mask[part] = False
    summed = torch.zeros(layout.size)
    trainer._add_clipped({"nll": Term(nll[None], torch.zeros(1, dtype=torch.long))}, 1, 1, summed)
    assert summed[trained_at].item() == pytest.approx(2.0) and summed[frozen] == 0


def _named(trainer, layout):
    """The trained parameters by the layout's names."""
    return {name: p for name, p in trainer.trainable.network.named_parameters() if name in layout.names}


@pytest.mark.parametrize("strategy", [FfaLora(), RoLora()], ids=lambda s: s.kind)
def test_rounds_of_example_level_noise_leave_the_frozen_half_alone(rule_of_rows, rows, strategy):
    for round_ in range(2):
        start, end, trainer = rule_of_rows(strategy, 1.0, 0.5, round_=round_)
        layout, moved = trainer.trainable.layout, end - start
        stays = LORA_A if round_ == 0 or strategy.kind == "ffa" else LORA_B
        noise = torch.cat([moved[part] for part in slices(layout, LORA_B if stays == LORA_A else LORA_A)])
        assert not any(moved[part].any() for part in slices(layout, stays))
        assert noise.all()
        # Rows' gradients are shorter than 0.5 each, and the noise's norm is several times as long.
        assert noise.var().item() == pytest.approx((0.5 / rows.num_rows) ** 2, rel=0.25)


def test_what_a_client_has_pruned_stays_pruned_under_noise(rule_of_rows):
    state = {"strategy.rank": torch.tensor([2.0])}
    start, end, trainer = rule_of_rows(HetLora(), 1.0, 0.5, state=state, lora_rank=3)
    for before, after in zip(
        trainer.trainable.layout.lora_pairs(start), trainer.trainable.layout.lora_pairs(end), strict=True
    ):
        assert not before.a_RI[2:].any() and not after.a_RI[2:].any() and not after.b_OR[:, 2:].any()
        assert (after.a_RI != before.a_RI)[:2].all() and (after.b_OR != before.b_OR)[:, :2].all()
