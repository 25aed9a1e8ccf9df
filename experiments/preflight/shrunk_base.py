"""Small stand-ins for large base models: the configuration of a base without its weights, and its shrunk architecture.

Each file in `families` describes bases that are known by name: the names, and the keys of all sizes and of each size.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.base_model import causal_config
from experiments.config.recipe import SHIPPED

FAMILIES = Path(__file__).parent.parent / "families"
LAYERS, HEAD, KEYS, GROUP = 2, 16, 2, 8
OWNERS = ("num_kv_heads", "num_key_value_heads")  # the number of heads of keys and values
# Other sizes, and what they are at most.
MOST = {"head_dim": HEAD, "sliding_window": 8, "num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
# Keys of sizes that grow with the model's width.
WIDTHS = ("intermediate_size", "n_inner", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")
# The shipped tokenizer has no chat template, and rows may be conversations.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for turn in messages %}{{ turn.role + ':' + (turn.reasoning_content or '') + (turn.content or '') }}"
    "{% if turn.tool_calls %}{{ turn.tool_calls | tojson }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def base_config(model: Model) -> Any:
    """The base's configuration from its folder, the hub's cache, or a family's file; RunError if there is none."""
    if Path(model.base).is_dir():
        return causal_config(model)
    try:
        cached = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
        keys = family_keys(model.base)
    except HFValidationError:  # a path, to a folder that does not exist
        cached = keys = None
    if isinstance(cached, str):
        return causal_config(replace(model, base=str(Path(cached).parent), revision=None))
    if keys is None:
        raise RunError(
            f"model.base {model.base!r} is not a folder, not in the hub's cache, and of no family that is known here "
            f"({', '.join(sorted(file.stem for file in FAMILIES.glob('*.json')))}): save its config.json in a folder "
            f"and dry-run with --set model.base=FOLDER"
        )
    return AutoConfig.for_model(**keys)


def family_keys(name: str) -> dict[str, Any] | None:
    """The known keys of a config.json for a base of that name on the hub; None for unknown names."""
    for file in sorted(FAMILIES.glob("*.json")):
        family = json.loads(file.read_text(encoding="utf-8"))
        if re.search(family["names"], name, re.IGNORECASE):
            keys: dict[str, Any] = family["config"]
            for size, of_size in family["sizes"].items():
                if re.search(rf"(?<![a-z0-9.])(?:{size})(?![a-z0-9])", name, re.IGNORECASE):
                    keys = keys | of_size
            return keys
    return None


def shrunk(config: Any, tokenizer: Any) -> Any:
    """The same architecture with few and narrow layers, and with the tokenizer's vocabulary.

    It keeps each kind of layer, the ratio of heads to keys, the feed-forward and attention widths over the model's
    width, tied embeddings, and every key that is not a size.
    """
    old: dict[str, Any] = config.to_dict()
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    owner = OWNERS[0] if OWNERS[0] in old else OWNERS[1]
    keys = old.get(owner) or heads
    new_keys = min(keys, KEYS)
    new_heads = new_keys * min(heads // keys, GROUP)
    # Even, since rotary embeddings turn pairs; a multiple of the heads, which some architectures demand.
    head = old.get("head_dim") or hidden // heads
    width = new_heads * max(2, 2 * round(HEAD * hidden / (heads * head) / 2))
    # The first layer of each kind, repeated until there are at least LAYERS.
    by_layer = [name for name, value in old.items() if isinstance(value, list) and len(value) == layers]
    kinds = [json.dumps([old[name][layer] for name in by_layer]) for layer in range(layers)]
    first = [layer for layer, kind in enumerate(kinds) if kinds.index(kind) == layer]
    picked = (first * LAYERS)[: max(LAYERS, len(first))]
    new = {"hidden_size": width, "num_attention_heads": new_heads, "num_hidden_layers": len(picked), "dtype": "float32"}
    new |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    new["vocab_size"] = len(tokenizer)
    new = {config.attribute_map.get(name, name): value for name, value in new.items()}
    new |= {name: [old[name][layer] for layer in picked] for name in by_layer}
    new |= {name: max(8, 8 * round(old[name] * width / hidden / 8)) for name in WIDTHS if old.get(name)}
    new |= {name: min(old[name], most) for name, most in {**MOST, owner: new_keys}.items() if old.get(name)}
    if old.get("rope_parameters"):
        new["rope_parameters"] = _resized(old["rope_parameters"])
    old.pop("quantization_config", None)
    return type(config).from_dict(old | new)


def _resized(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of HEAD: lists of factors are cut to their pairs."""
    pairs = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
    resized = {name: _resized(value) for name, value in rope.items() if isinstance(value, dict)}
    return rope | resized | {name: value[:pairs] for name, value in rope.items() if isinstance(value, list)}


def described(config: Any) -> str:
    """The sizes of a model, in words."""
    keys, heads = config.to_dict(), config.num_attention_heads
    shared = keys.get(OWNERS[0]) or keys.get(OWNERS[1]) or heads
    experts = keys.get("num_local_experts") or keys.get("num_experts")
    layers = f"{config.num_hidden_layers} layers, width {config.hidden_size:,}, {heads} heads over {shared}, "
    return layers + (f"{experts} experts, " if experts else "") + f"vocabulary {config.vocab_size:,}"


def write_base(config: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a folder with a model of this configuration, of random weights from a fixed seed, and the tokenizer."""
    disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stand_in_tokenizer() -> Any:
    """The shipped tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
