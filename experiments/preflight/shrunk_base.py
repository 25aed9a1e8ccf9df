"""Small stand-ins for large base models: the configuration of a base without its weights, and random weights.

Each file in `families` describes bases that are known by name: the names, and the keys of all sizes and of each size.
"""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.base_model import causal_config
from experiments.config.recipe import SHIPPED
from experiments.preflight.family_list import FAMILIES
from experiments.preflight.shrunk_config import EXPERTS, OWNERS

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


def described(config: Any) -> str:
    """The sizes of a model, in words."""
    keys, heads = config.to_dict(), getattr(config, "num_attention_heads", None)
    shared = next((keys[name] for name in OWNERS if keys.get(name)), heads)
    experts = next((keys[name] for name in EXPERTS if keys.get(name)), None)
    attention = f"{heads} heads over {shared}, " if heads else ""
    layers = f"{config.num_hidden_layers} layers, width {config.hidden_size:,}, {attention}"
    return layers + (f"{experts} experts, " if experts else "") + f"vocabulary {config.vocab_size:,}"


def write_base(config: Any, tokenizer: Any, folder: Path, *, scores: bool = False) -> None:
    """Writes a folder with a model of this configuration, of random weights from a fixed seed, and the tokenizer.

    With `scores` it gives texts one score.
    """
    disable_progress_bar()
    torch.manual_seed(0)
    kind, config = AutoModelForCausalLM, deepcopy(config)
    if scores:
        kind, config.num_labels = AutoModelForSequenceClassification, 1
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stand_in_tokenizer() -> Any:
    """The shipped tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
