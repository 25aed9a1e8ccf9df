"""Files of weights for ranks that read slices: renamed tensors, buffers that belong to the weights, other pieces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from engine.config.adapters import FullTuning
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.export import sharded_files
from engine.models.stored_weights import persistent_buffers, refuse_missing, stored_tensors, weight_files
from engine.models.trainable import Trainable

BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A DeepSeek-V3 whose experts' scores have a bias that no optimizer trains, and its folder."""
    config = DeepseekV3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    network = DeepseekV3ForCausalLM(config)
    persistent_buffers(network)[BIAS].copy_(torch.arange(4.0))
    network.save_pretrained(tmp_path, save_original_format=False)
    return network, tmp_path


def test_renamed_tensors_are_those_of_the_network(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=30, **sizes))
    network.save_pretrained(tmp_path)
    stored = stored_tensors(network, weight_files(Model(base=str(tmp_path))))
    assert stored["lm_head.weight"][1] == "embed_out.weight"
    refuse_missing(network, stored, "base")
    for name, parameter in network.named_parameters():
        file, key = stored[name]
        with safe_open(file, framework="pt") as weights:
            assert torch.equal(weights.get_tensor(key), parameter)


def test_buffers_that_belong_to_the_weights_must_be_in_the_files(mixture: tuple[PreTrainedModel, Path]) -> None:
    network, folder = mixture
    assert persistent_buffers(network).keys() == {BIAS}
    stored = stored_tensors(network, weight_files(Model(base=str(folder))))
    assert BIAS in stored
    refuse_missing(network, stored, "base")
    weights = load_file(folder / "model.safetensors")
    del weights[BIAS]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=f"not whole: {BIAS} are missing"):
        refuse_missing(network, stored_tensors(network, weight_files(Model(base=str(folder)))), "base")


def test_experts_in_other_pieces_are_refused_with_the_way_out(mixture: tuple[PreTrainedModel, Path]) -> None:
    network, folder = mixture
    network.save_pretrained(folder)  # as on the hub: each expert by itself
    stored = stored_tensors(network, weight_files(Model(base=str(folder))))
    with pytest.raises(RunError, match=r"in other pieces, such as .*experts\.0.*set clients\.zero\.stage = 2, or save"):
        refuse_missing(network, stored, "base")


def test_a_model_that_is_exported_in_shards_has_its_buffers(
    mixture: tuple[PreTrainedModel, Path], make_trainable: Callable[..., Trainable], tokenizer: Any, tmp_path: Path
) -> None:
    network, folder = mixture
    trainable = make_trainable(folder, FullTuning(), attention="eager")
    flat = trainable.flat.detach()
    model = Model(base=str(folder), peft=FullTuning())
    out = tmp_path / "out"
    out.mkdir()
    for name, content in sharded_files(
        trainable.network, trainable.layout, lambda first, last: flat[first:last].clone(), model, tokenizer, "card"
    ):
        (out / name).write_bytes(content)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
