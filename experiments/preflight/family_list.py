"""The families of base models that are checked, and their configurations. Importable without transformers."""

import json
from pathlib import Path
from typing import Any

COLUMNS = ("LoRA", "full", "lanes", "gangs", "quantized")  # what is checked
FAMILIES = Path(__file__).parent.parent / "families"
# Families without a file, by model type, with what the defaults of their configuration class lack.
_HEADS, _MIXED = {"head_dim": 128}, ["linear_attention"] * 5 + ["full_attention"]
OTHERS: dict[str, dict[str, Any]] = {
    **{
        "afmoe": {},
        "apertus": {},
        "arcee": {},
        "bamba": {"attn_layer_indices": [9, 18, 27]},
        "bloom": {},
        "cohere": {},
    },
    **{"cohere2": {}, "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8.0}}},
    **{"deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1}, "deepseek_v3": {}, "diffllama": {}},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    **{"ernie4_5": {}, "ernie4_5_moe": {}, "exaone4": {}, "falcon_h1": {}, "falcon_mamba": {}, "flex_olmo": {}},
    **{
        "gemma4_text": {},
        "glm4": {},
        "glm4_moe": {},
        "gpt_bigcode": {},
        "gpt_oss": {},
        "gptj": {},
    },
    **{"granite": {}, "granitemoe": {}, "granitemoehybrid": {"layer_types": _MIXED * 5 + _MIXED[:2]}, "helium": {}},
    **{"hunyuan_v1_dense": _HEADS, "jamba": {}, "jetmoe": {}, "kimi_linear": {}, "lfm2": {"full_attn_idxs": [2, 5, 8]}},
    **{"lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16}, "llama4_text": {}, "mamba": {}, "mamba2": {}},
    **{"minicpm3": {}, "minimax": {}, "minimax_m2": {}, "ministral": _HEADS, "modernbert-decoder": {}, "mpt": {}},
    **{"nanochat": {}, "nemotron": {"head_dim": 128, "num_key_value_heads": 8}, "nemotron_h": {}, "olmo": {}},
    **{"olmo3": {}, "olmo_hybrid": {}, "olmoe": {}, "opt": {}, "phimoe": {}, "qwen2_moe": {}, "qwen3_5_text": {}},
    **{
        "qwen3_next": {},
        "rwkv": {"rescale_every": 0},
        "seed_oss": {},
        "solar_open": {},
        "stablelm": {},
        "starcoder2": {},
    },
    **{"vaultgemma": {}, "xglm": {}, "youtu": {}, "zamba2": {}},
}


def family_names() -> dict[str, str]:
    """The families, each with the expression of its bases' names, or with its model type."""
    files = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))["names"] for file in sorted(FAMILIES.glob("*.json"))
    }
    return dict(sorted((files | {family: f"model_type {family}" for family in OTHERS}).items()))


def family_config(family: str) -> Any:
    """The configuration of a family's bases."""
    from transformers import AutoConfig

    file = FAMILIES / f"{family}.json"
    if file.exists():
        return AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8"))["config"])
    return AutoConfig.for_model(family, **OTHERS[family])
