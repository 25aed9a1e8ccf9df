"""Weights that are made again from amounts of random directions."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.config.sections import Model
from engine.config.seeds import Seeds
from engine.config.train import Sgd, Train
from engine.models.base_model import map_base, read_base
from engine.models.export import export_files
from engine.models.seeded import Seeded
from engine.objectives.base import counted, step_loss
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training
from engine.training.zeroth_order import ZerothTrainer
from strategies.core.seeds import rng

K = 16


@pytest.fixture
def seeded(bases):
    def made(base="tied"):
        model = Model(base=str(bases[base]), peft=Seeds(candidates=K, eps=1e-3))
        packed, buffer = read_base(model)
        return Seeded(map_base(packed, torch.from_numpy(buffer)), model, 5)

    return made


def amounts(*pairs):
    vector = torch.zeros(K)
    for number, amount in pairs:
        vector[number] = amount
    return vector


def test_weights_are_the_base_and_the_directions(seeded):
    ours = seeded()
    base_W = torch.cat([tensor.reshape(-1) for tensor in ours.base])
    assert torch.equal(ours.network_W, base_W)
    ours.become(amounts((3, 0.5), (7, -0.25)))
    by_hand = base_W + 0.5 * ours.direction(3) - 0.25 * ours.direction(7)
    torch.testing.assert_close(ours.network_W, by_hand)
    assert torch.equal(ours.base[0], seeded().base[0])  # the shared base is as it was
    assert abs(float(ours.direction(3).std()) - 1) < 0.02 and not torch.equal(ours.direction(3), ours.direction(4))


def test_replaying_gives_the_same_bits_whatever_was_before(seeded):
    first, second = seeded(), seeded()
    for vector in (amounts((1, 1.0)), amounts((1, 1.0), (2, 1e-3)), amounts((9, 3.0), (2, 1e-3))):
        first.become(vector)
    second.become(amounts((9, 3.0), (2, 1e-3)))
    assert torch.equal(first.network_W, second.network_W)
    moved = first.network_W.clone()
    direction_W = first.direction(4)
    first.look(direction_W, 0.1)
    first.look(direction_W, -0.1)
    first.move(4, direction_W, 0.0)
    assert torch.equal(first.network_W, moved)  # looking around leaves no trace


def test_tied_weights_are_trained_once(seeded):
    ours = seeded("tied")
    network = ours.network
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert len(ours.network_W) == sum(parameter.numel() for parameter in network.parameters())


def test_a_step_is_a_slope_by_hand(seeded, rows, federation):
    train = Train(steps=1, batch=8, optimizer=Sgd(lr=0.5), clip=0.0, objective=federation.train.objective)
    ours = seeded()
    plain = LocalTrainer(ours, 0, train)
    trainer = ZerothTrainer(plain, ours)
    trainer.walk = lambda steps: torch.tensor([6]).numpy()
    stream = rng(1, 0, 0, "batches")
    (result,) = trainer.train([Training(rows, torch.zeros(K), stream, 0)], train)
    order = rng(1, 0, 0, "batches").permutation(rows.num_rows)

    def loss(amount):
        other = seeded()
        other.look(other.direction(6), amount)
        pieces = plain.cut(rows.take(order), 8)
        sums = {
            name: term.total()
            for piece in pieces
            for name, term in train.objective.terms(other.network.eval(), piece, plain.context).items()
        }
        return float(step_loss(train.objective, sums, counted(train.objective, pieces)))

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert result.end[6] == pytest.approx(-0.5 * slope, rel=1e-3)
    assert int(result.end.count_nonzero()) == 1 and slope != 0
    assert result.metrics["loss"] == pytest.approx((loss(1e-3) + loss(-1e-3)) / 2, rel=1e-5)
    # The slope is that of the gradient along the direction.
    other = seeded()
    other.network.requires_grad_(True)
    piece = plain.cut(rows.take(order), 8)[0]
    term = train.objective.terms(other.network.eval(), piece, plain.context)["nll"]
    (term.total() / piece.learned).backward()
    gradient_W = torch.cat([parameter.grad.reshape(-1) for parameter in other.network.parameters()])
    assert float(gradient_W @ other.direction(6)) == pytest.approx(slope, rel=0.05)


def test_the_slope_is_clipped(seeded, rows, federation):
    train = Train(steps=1, batch=8, optimizer=Sgd(lr=1.0), clip=1e-4, objective=federation.train.objective)
    ours = seeded()
    trainer = ZerothTrainer(LocalTrainer(ours, 0, train), ours)
    (result,) = trainer.train([Training(rows, torch.zeros(K), rng(1, 0, 0, "batches"), 0)], train)
    assert float(result.end.abs().max()) == pytest.approx(1e-4)


def test_the_exported_model_loads_with_transformers_and_tells_how_to_replay(seeded, bases, tokenizer, tmp_path):
    ours, model = seeded(), Model(base=str(bases["tied"]), peft=Seeds(candidates=K))
    ours.become(amounts((3, 0.5), (7, -0.25)))
    for name, content in export_files(ours, model, tokenizer, "card").items():
        (tmp_path / name).write_bytes(content)
    facts = json.loads((tmp_path / "seeds.json").read_text())
    assert facts == {"seed": 5, "candidates": K, "amounts": {"3": 0.5, "7": -0.25}}
    again = seeded()
    again.become(amounts(*((int(number), amount) for number, amount in facts["amounts"].items())))
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in again.network.named_parameters())
    assert load_file(tmp_path / "model.safetensors")
