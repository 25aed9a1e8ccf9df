"""Shrunk configurations of families whose sizes have other names than Llama's."""

import pytest
from transformers import AutoConfig

from engine.messages.errors import RunError
from experiments.config.recipe import RECIPES, load_recipe
from experiments.preflight import shrunk_config
from experiments.preflight.dry import dry_run
from experiments.preflight.families import Vocabulary
from experiments.preflight.shrunk_base import described
from experiments.preflight.shrunk_config import shrunk


def small(model_type, **keys):
    return shrunk(AutoConfig.for_model(model_type, **keys), Vocabulary())


def test_a_state_space_has_no_heads_of_attention():
    mamba = small("mamba")
    assert (mamba.hidden_size, mamba.intermediate_size, mamba.state_size, mamba.num_hidden_layers) == (32, 64, 8, 2)
    assert described(mamba) == "2 layers, width 32, vocabulary 64"
    mamba2 = small("mamba2")
    assert mamba2.num_heads * mamba2.head_dim == mamba2.expand * mamba2.hidden_size == 64


def test_state_spaces_beside_attention_keep_both_kinds_of_layers():
    bamba = small("bamba", attn_layer_indices=[9, 18])
    assert (bamba.num_hidden_layers, bamba.attn_layer_indices) == (2, [1])
    assert bamba.mamba_n_heads * bamba.mamba_d_head == bamba.mamba_expand * bamba.hidden_size
    jamba = small("jamba")
    assert (jamba.attn_layer_period, jamba.attn_layer_offset, jamba.num_experts) == (2, 1, 4)


def test_latent_attention_and_experts_are_narrow_and_of_both_kinds():
    deepseek = small("deepseek_v3")
    assert (deepseek.num_hidden_layers, deepseek.first_k_dense_replace) == (2, 1)  # one dense layer, one of experts
    assert (deepseek.n_routed_experts, deepseek.num_experts_per_tok, deepseek.n_group) == (4, 2, 2)
    assert deepseek.qk_head_dim == deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim == 24
    assert deepseek.head_dim == deepseek.qk_rope_head_dim
    assert "4 experts" in described(deepseek)


def test_layers_that_are_named_by_number_are_named_by_their_new_ones():
    gemma = small("gemma4_text", per_layer_config={layer: {"num_key_value_heads": 1} for layer in range(5, 30, 6)})
    assert gemma.layer_types == ["sliding_attention", "full_attention"]
    assert {layer: keys["num_key_value_heads"] for layer, keys in gemma.to_dict()["per_layer_config"].items()} == {
        "1": 1
    }


def test_sections_of_a_configuration_are_shrunk_too():
    dbrx = small("dbrx", attn_config={"kv_n_heads": 8, "rope_theta": 5e5}, ffn_config={"moe_num_experts": 16})
    assert (dbrx.attn_config.kv_n_heads, dbrx.attn_config.rope_theta) == (2, 5e5)
    assert (dbrx.ffn_config.moe_num_experts, dbrx.n_heads) == (4, 4)


def test_what_cannot_be_shrunk_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(shrunk_config, "shrunk", lambda config, tokenizer: 1 / 0)
    with pytest.raises(RunError, match=r"a LlamaConfig cannot be shrunk \(division by zero\): save a small base"):
        dry_run(load_recipe(RECIPES / "demo.toml"))
