"""Lanes refuse models in which rows of a batch depend on each other, and those that draw random numbers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from engine.config.adapters import Lora
from engine.config.sections import Model
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.models.base_model import map_base, read_base
from engine.models.trainable import Trainable
from engine.training.lane_probe import random_sizes
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training

MakeTrainable = Callable[..., Trainable]
LORA = Lora(r=4, alpha=8)


def in_lanes(trainable: Trainable, max_length: int = 64) -> LaneTrainer:
    train = Train(steps=1, max_length=max_length)
    return LaneTrainer(LocalTrainer(trainable, 0, train), 2, train)


@pytest.fixture
def trainable(bases: dict[str, Path], make_trainable: MakeTrainable) -> Trainable:
    return make_trainable(bases["untied"], LORA)


def decoder_layer(trainable: Trainable) -> Any:
    return trainable.network.get_submodule("base_model.model.model.layers.0.mlp")


def test_a_plain_model_passes_and_keeps_its_mode_and_the_random_numbers(trainable: Trainable) -> None:
    for training in (True, False):
        trainable.network.train(training)
        state = torch.get_rng_state()
        in_lanes(trainable)
        assert trainable.network.training is training and torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in trainable.network.modules())


def test_layers_that_see_tokens_in_another_order_are_refused(
    trainable: Trainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens first, rows second, as some families have it: the shapes alone would not show it."""
    layer = decoder_layer(trainable)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x.transpose(0, 1)).transpose(0, 1))
    with pytest.raises(
        RunError, match=r"row by row, which .*layers\.0\.mlp\.gate_proj does not: leave it out of model"
    ):
        in_lanes(trainable)


def test_layers_that_see_some_tokens_are_refused(trainable: Trainable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As experts that are layers of their own: a router sends them tokens of any row."""
    layer = decoder_layer(trainable)
    forward = layer.forward

    def routed(x: torch.Tensor) -> torch.Tensor:
        chosen = x.sum(-1) > 0
        out = x.clone()
        out[chosen] = forward(x[chosen])
        return out

    monkeypatch.setattr(layer, "forward", routed)
    with pytest.raises(RunError, match="row by row"):
        in_lanes(trainable)


def test_tokens_in_one_list_are_no_reason(trainable: Trainable, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = decoder_layer(trainable)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x.flatten(0, 1)).view_as(x))
    in_lanes(trainable)


def test_random_numbers_in_training_are_refused_and_those_of_adapters_are_not(
    bases: dict[str, Path], make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainable = make_trainable(bases["untied"], Lora(r=4, alpha=8, dropout=0.3))
    in_lanes(trainable)
    layer = decoder_layer(trainable)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: nn.functional.dropout(forward(x), 0.1, layer.training))
    with pytest.raises(RunError, match=r"the base draws random numbers in training.*: set clients\.lanes = 1"):
        in_lanes(trainable)


def test_what_is_drawn_is_also_found_in_sections_of_a_configuration() -> None:
    keys = {"attn_config": {"attn_pdrop": 0.1}, "router_jitter_noise": 0.01, "classifier_dropout": 0.1, "dropout": 0.0}
    assert dict(random_sizes(keys)) == {"attn_pdrop": 0.1, "router_jitter_noise": 0.01}


def test_attention_of_a_mixture_of_experts_in_lanes_is_that_of_single_clients(
    tmp_path: Path, rows: pa.RecordBatch
) -> None:
    """In float64 to 1e-7, as softmax is in float32: the router's choice jumps, but it is a token's own."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = MixtralForCausalLM(MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, **sizes))
    for name, parameter in network.named_parameters():
        if "gate" in name:
            parameter.data.normal_()  # tokens go to different experts
    network.save_pretrained(tmp_path)
    model = Model(base=str(tmp_path), attention="eager", peft=replace(LORA, targets=("q_proj", "v_proj", "o_proj")))
    packed, buffer = read_base(model)
    network = map_base(packed, torch.from_numpy(buffer)).double()
    network.config._experts_implementation = "eager"  # grouped products have no float64
    for module in network.modules():
        if isinstance(module, MixtralRMSNorm):  # transformers casts to float32
            module.forward = MethodType(
                lambda it, x: it.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + it.variance_epsilon),
                module,
            )
    train = Train(epochs=2, batch=2, optimizer=Sgd(lr=1.0))
    alone = LocalTrainer(Trainable(network, model, 3), 0, train)
    lanes, start = LaneTrainer(alone, 3, train), alone.trainable.initial

    def trainings() -> list[Training]:
        parts = [rows.slice(0, 3), rows.slice(1, 1), rows.slice(2, 3)]
        return [Training(part, start, np.random.default_rng(number), number) for number, part in enumerate(parts)]

    for together, training in zip(lanes.train(trainings(), train), trainings(), strict=True):
        (single,) = alone.train([training], train)
        assert (single.end - start).abs().max() > 1e-3
        torch.testing.assert_close(together.end, single.end, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_of_the_longest_row_are_refused_above_what_was_trained(trainable: Trainable, kind: str) -> None:
    trainable.network.config.rope_parameters = {"rope_type": kind}
    trainable.network.config.max_position_embeddings = 64
    in_lanes(trainable, max_length=64)
    with pytest.raises(RunError, match=r"set train\.max_length to at most 64, or set clients\.lanes = 1"):
        in_lanes(trainable, max_length=65)


def test_experts_weights_are_refused_with_the_way_out(tmp_path: Path, make_trainable: MakeTrainable) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"name the attention layers there\), or set clients\.lanes = 1"):
        in_lanes(make_trainable(tmp_path, LORA))
    in_lanes(make_trainable(tmp_path, Lora(r=4, alpha=8, targets=("q_proj", "v_proj"))))
