"""Shrinks the configuration of a model: the same architecture with few and narrow layers.

Configurations of different families have different names for the same sizes; the tables below list them.
"""

import json
import re
from typing import Any

LAYERS, HEAD, KEYS, GROUP = 2, 16, 2, 8
OWNERS = ("num_kv_heads", "num_key_value_heads", "kv_n_heads")  # the number of heads of keys and values
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Sizes that grow with the model's width.
WIDTHS = re.compile(
    r".*intermediate_size(_mlp)?|n_inner|(expert_)?ffn_hidden_size|ffn_dim|word_embed_proj_dim|mamba_d_ssm|dim_model_base"
)
# Other sizes, and what they are at most.
MOST = {
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention"), 8),
    **dict.fromkeys(("window_size", "chunk_size", "mamba_chunk_size", "block_size", "block_multiple_of"), 8),
    **dict.fromkeys((*EXPERTS, "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "topk_group"), 1),
    **dict.fromkeys(
        ("head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels", "rotary_dim", "index_head_dim"), HEAD
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "q_lora_rank"), HEAD),
    **dict.fromkeys(("kv_lora_rank", "hidden_size_per_layer_input", "o_lora_rank", "adapter_rank"), HEAD),
    **dict.fromkeys(("qk_rope_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "index_topk"), 8),
    **dict.fromkeys(("laurel_rank", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads", "index_n_heads"), 2),
    "linear_num_value_heads": 4,
    # Every second layer is of another kind; the offset says which of the two it is.
    **dict.fromkeys(
        ("attn_layer_period", "expert_layer_period", "interleave_moe_layer_step", "decoder_sparse_step"), 2
    ),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
}
# Numbers and sizes of the heads of state spaces, whose product grows with the model's width.
STATE_HEADS = {"mamba_n_heads": "mamba_d_head", "mamba_num_heads": "mamba_head_dim", "n_mamba_heads": "mamba_headdim"}
# Computed from the others, or of no use here.
DROPPED = ("qk_head_dim", "attention_hidden_size", "attention_head_dim", "quantization_config", "id2label", "label2id")
INDICES = ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers", "moe_layers")
# Numbers of layers at the start, and at the end, that are different.
FIRST, LAST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), ("num_kv_shared_layers",)


def shrunk(config: Any, tokenizer: Any) -> Any:
    """The same architecture with few and narrow layers, and with the tokenizer's vocabulary.

    It keeps each kind of layer, the ratio of heads to keys, the feed-forward and attention widths over the model's
    width, tied embeddings, and every key that is not a size.
    """
    old: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name not in DROPPED}
    hidden, has_heads = config.hidden_size, getattr(config, "num_attention_heads", None)
    heads = has_heads or 1
    width, new_heads, new_keys = _width(config, old, hidden, heads)
    new: dict[str, Any] = {"hidden_size": width, "dtype": "float32", "vocab_size": len(tokenizer)}
    new |= {"num_attention_heads": new_heads} if has_heads else {}
    # The end token stands in for one that the tokenizer lacks: some classes take numbers alone.
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    new |= {name: tokenizer.eos_token_id if number is None else number for name, number in ids.items()}
    picked, layers = _few_layers(old, config.num_hidden_layers)
    new["num_hidden_layers"] = len(picked)
    new = {config.attribute_map.get(name, name): value for name, value in new.items()}
    sizes = layers | _resized(old | layers, width / hidden, new_keys)
    if "vocab_size_per_layer_input" in old:
        new["vocab_size_per_layer_input"] = len(tokenizer)
    pairs = STATE_HEADS if has_heads else {"num_heads": "head_dim"}
    for number, size in pairs.items():
        if old.get(number):
            total = round(old[number] * _head(old, size, hidden, number) * width / hidden)
            sizes |= {size: HEAD, number: max(1, total // HEAD)}
    if old.get("rope_parameters"):
        sizes["rope_parameters"] = _rope(old["rope_parameters"])
    if old.get("head_dim") and old["head_dim"] == old.get("qk_rope_head_dim"):
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    return type(config).from_dict(old | sizes | new)


def _width(config: Any, old: dict[str, Any], hidden: int, heads: int) -> tuple[int, int, int]:
    """The small model's width, its number of heads, and of those of keys."""
    if getattr(config, "num_attention_heads", None) is None:
        return 2 * HEAD, 1, 1
    nested = old | (old.get("attn_config") or {})
    keys = next((nested[name] for name in OWNERS if nested.get(name)), heads)
    new_keys = min(keys, KEYS)
    new_heads = new_keys * min(heads // keys, GROUP)
    # Even, since rotary embeddings turn pairs; a multiple of the heads, which some architectures demand.
    head = old.get("head_dim") or hidden // heads
    if old.get("qk_rope_head_dim"):
        head = hidden // heads
    return new_heads * max(2, 2 * round(HEAD * hidden / (heads * head) / 2)), new_heads, new_keys


def _head(old: dict[str, Any], size: str, hidden: int, number: str) -> int:
    """The size of a state space's head, which may be left to follow from the width."""
    value = old.get(size)
    return value if isinstance(value, int) else int(old.get("mamba_expand", 2) * hidden) // old[number]


def _few_layers(old: dict[str, Any], layers: int) -> tuple[list[int], dict[str, Any]]:
    """The first layer of each kind, repeated until there are at least LAYERS, and the keys that list layers."""
    by_layer = [name for name, it in old.items() if isinstance(it, list) and len(it) == layers and name not in INDICES]
    indices = [name for name in INDICES if isinstance(old.get(name), list)]
    first = [name for name in FIRST if old.get(name)]
    last = [name for name in LAST if old.get(name)]
    each = {int(layer): keys for layer, keys in (old.get("per_layer_config") or {}).items()}

    def kind(layer: int) -> str:
        traits = [old[name][layer] for name in by_layer] + [layer in old[name] for name in indices]
        traits += [layer < old[name] for name in first] + [layer >= layers - old[name] for name in last]
        return json.dumps([*traits, each.get(layer)])

    kinds = [kind(layer) for layer in range(layers)]
    firsts = [layer for layer in range(layers) if kinds.index(kinds[layer]) == layer]
    picked = (firsts * LAYERS)[: max(LAYERS, len(firsts))]
    new: dict[str, Any] = {name: [old[name][layer] for layer in picked] for name in by_layer}
    new |= {name: [place for place, layer in enumerate(picked) if layer in old[name]] for name in indices}
    new |= {name: sum(layer < old[name] for layer in picked) for name in first}
    new |= {name: sum(layer >= layers - old[name] for layer in picked) for name in last}
    if each:
        new["per_layer_config"] = {place: each[layer] for place, layer in enumerate(picked) if layer in each}
    return picked, new


def _resized(old: dict[str, Any], ratio: float, keys: int) -> dict[str, Any]:
    """The sizes among the keys, and among those of nested sections; `keys` heads of keys and values."""
    most = {**MOST, **dict.fromkeys(OWNERS, keys)}
    new = dict[str, Any]()
    for name, value in old.items():
        if isinstance(value, dict):
            new[name] = value | _resized(value, ratio, keys)
        elif not isinstance(name, str):  # a number of something
            continue
        elif WIDTHS.fullmatch(name) and isinstance(value, (int, list)) and value:
            scaled = [max(8, 8 * round(each * ratio / 8)) for each in (value if isinstance(value, list) else [value])]
            new[name] = scaled if isinstance(value, list) else scaled[0]
        elif name in most and isinstance(value, int) and value:
            new[name] = min(value, most[name])
    return new


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of HEAD: lists of factors are cut to their pairs."""
    pairs = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
    resized = {name: _rope(value) for name, value in rope.items() if isinstance(value, dict)}
    return rope | resized | {name: value[:pairs] for name, value in rope.items() if isinstance(value, list)}
