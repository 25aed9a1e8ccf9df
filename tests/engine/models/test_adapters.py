"""Adapters that PEFT has beyond matrices of linear layers: right under plain averaging, refused by rules on A and B."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from engine.config.adapters import Lora
from engine.config.federation import Federation
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.models.adapters import refuse_other_adapters, with_adapters
from engine.models.export import sharded_files
from engine.models.trainable import Trainable
from engine.training.local_training import LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.training.step_loop import Training
from strategies.averaging.fedavg import FedAvg
from strategies.lora.frozen_half import FfaLora
from strategies.lora.hetlora import HetLora
from strategies.lora.products import FedExLora, Flora
from strategies.personalized.personal_models import FedDpa

EMBEDDING = Lora(r=4, alpha=8, targets=("embed_tokens", "q_proj"))
MakeTrainable = Callable[..., Trainable]


@pytest.mark.parametrize("strategy", [FfaLora(), Flora(), FedExLora(), HetLora(), FedDpa()], ids=lambda s: s.kind)
def test_rules_on_the_matrices_refuse_an_adapter_of_embeddings(
    federation: Federation, bases: dict[str, Path], make_trainable: MakeTrainable, strategy: Any
) -> None:
    federation = replace(federation, strategy=strategy, model=replace(federation.model, peft=EMBEDDING))
    with pytest.raises(
        RunError, match=r"something else is trained in model\.embed_tokens: leave it out of model\.peft"
    ):
        refuse_other_adapters(make_trainable(bases["tied"], EMBEDDING).network, federation)
    for base in ("tied", "gpt2"):  # linear layers, also with GPT-2's transposed weights
        refuse_other_adapters(make_trainable(bases[base]).network, federation)


def mixture() -> MixtralForCausalLM:
    """A network whose experts are parameters, not layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes)
    return MixtralForCausalLM(config).requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "module"),
    [
        ({"use_dora": True}, "self_attn.q_proj"),
        ({"bias": "lora_only", "targets": ("c_attn",)}, "attn.c_attn.base_layer.bias"),
        ({"modules_to_save": ("lm_head",)}, "lm_head"),
        ({"target_parameters": ("experts.gate_up_proj",)}, "mlp.experts"),
    ],
    ids=["dora", "bias", "modules_to_save", "parameters"],
)
def test_rules_on_the_matrices_refuse_all_else_that_peft_can_train(
    federation: Federation,
    bases: dict[str, Path],
    make_trainable: MakeTrainable,
    options: dict[str, Any],
    module: str,
) -> None:
    lora = Lora(**{"r": 4, "alpha": 8, "targets": ("q_proj",)} | options)
    if "target_parameters" in options:
        network = with_adapters(mixture(), replace(federation.model, peft=lora))
    else:
        network = make_trainable(bases["gpt2" if "bias" in options else "untied"], lora).network
    with pytest.raises(RunError, match=module):
        refuse_other_adapters(network, replace(federation, strategy=FfaLora()))
    refuse_other_adapters(network, replace(federation, strategy=FedAvg()))


def test_what_is_merged_into_the_base_may_not_change_a_tied_layer(
    federation: Federation, bases: dict[str, Path], make_trainable: MakeTrainable
) -> None:
    head = Lora(r=4, alpha=8, targets=("lm_head", "q_proj"))
    merging = replace(federation, strategy=FedExLora())
    with pytest.raises(RunError, match="another layer shares those of lm_head"):
        refuse_other_adapters(make_trainable(bases["tied"], head).network, merging)
    refuse_other_adapters(make_trainable(bases["untied"], head).network, merging)
    refuse_other_adapters(make_trainable(bases["tied"], head).network, replace(federation, strategy=FfaLora()))


def test_averaging_trains_an_embeddings_adapter(
    federation: Federation, bases: dict[str, Path], make_trainable: MakeTrainable, rows: pa.RecordBatch
) -> None:
    """A gradient step of both matrices, whose product PEFT scales by alpha / r."""
    refuse_other_adapters(make_trainable(bases["tied"], EMBEDDING).network, federation)
    train = Train(steps=1, batch=5, optimizer=Sgd(lr=1.0), clip=0)
    trainable = make_trainable(bases["tied"], EMBEDDING)
    trainer, start = LocalTrainer(trainable, 0, train), trainable.initial
    trained = trainer.train([Training(rows, start, np.random.default_rng(1), 0)], train)[0]
    moved = trainable.layout.views(trained.end - start)
    layer: Any = trainable.network.get_submodule("base_model.model.model.embed_tokens")
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    assert moved[f"{name}A.default"].abs().sum() > 0 and moved[f"{name}B.default"].abs().sum() == 0  # A starts at zero
    trainer.become(trained.end)
    a_RV, b_OR = (trainable.layout.views(trained.end)[f"{name}{half}.default"] for half in "AB")
    ids = torch.tensor([[3, 5]])
    with torch.no_grad():
        expected = layer.base_layer(ids) + 2 * (b_OR @ a_RV).T[ids]
        torch.testing.assert_close(layer(ids), expected, rtol=0, atol=1e-6)


def test_the_shards_of_an_embeddings_adapter_are_exported_by_peft_names(
    federation: Federation, bases: dict[str, Path], make_trainable: MakeTrainable, tokenizer: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load

    trainable, model = make_trainable(bases["tied"], EMBEDDING), replace(federation.model, peft=EMBEDDING)
    flat = trainable.flat.detach()
    read = lambda first, last: flat[first:last].clone()  # noqa: E731
    files = dict(sharded_files(trainable.network, trainable.layout, read, model, tokenizer, "card"))
    theirs = peft.get_peft_model_state_dict(trainable.network, save_embedding_layers=False)
    assert load(files["adapter_model.safetensors"]).keys() == theirs.keys()


def test_privacy_of_rows_refuses_an_embeddings_adapter(
    make_private: Callable[..., PrivateTrainer], rows: pa.RecordBatch
) -> None:
    train = Train(steps=1, batch=5, optimizer=Sgd(lr=1.0), clip=0)
    private = make_private(train=train, peft=EMBEDDING)
    with pytest.raises(
        RunError, match=r"does not give for .*lora_embedding_A.*: train adapters of linear layers alone"
    ):
        private.train([Training(rows, private.trainable.initial, np.random.default_rng(1), 0)], train)
