"""Reads a base model into one buffer that processes share, and maps a network onto that buffer.

Functions import transformers: it takes 220 MB and four seconds, and the command and the driver never need it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.objectives.base import Tokenizer

ALIGNMENT = 64  # bytes at which each tensor starts, as vector instructions need it
CAUSAL = "AutoModelForCausalLM"
TOWERS = ("vision_config", "audio_config")
# Keys by which a model writes to its weights, and the way out.
IN_PLACE = {"rescale_every": "set it to 0 there", "altup_coef_clip": "choose another base"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a packed base: its type, its shape and the offset of its first byte in the buffer."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    persistent: bool


@dataclass(frozen=True)
class PackedBase:
    """What `map_base` needs beside the buffer: the model's configuration and the index of its tensors.

    `config` is None for a base that ships its own code: unpickling it would need that code, which a process imports
    only when it reads the configuration of `model` itself.
    """

    model: Model
    config: Any | None  # a transformers PretrainedConfig
    index: Mapping[str, Entry]
    nbytes: int


def always_the_same_bits() -> None:
    """Makes torch and CUDA use deterministic kernels wherever they exist."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The default would write all allocated memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def load_tokenizer(model: Model) -> Tokenizer:
    """Loads the base's tokenizer, with its end token as pad token if it has none; RunError if it cannot be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(model.base, **_origin(model))
    except Exception as error:  # the base's own code may raise anything
        raise _refusal(model, "has no tokenizer that can be loaded", error) from error
    if not tokenizer.is_fast:
        raise RunError(f"the tokenizer of model.base {model.base!r} is no fast one: convert it to a tokenizer.json")
    if tokenizer.eos_token is None:
        raise RunError(f"the tokenizer of model.base {model.base!r} has no end token, which fine-tuning needs")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def causal_config(model: Model) -> Any:
    """Loads the base's configuration and registers its own code's class; RunError if it is no causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(model.base, **_origin(model))
        if model.trust_remote_code and CAUSAL in (vars(config).get("auto_map") or {}):
            _register(config, model)
    except Exception as error:  # the base's own code may raise anything
        what = "is neither a folder with a config.json nor a model that the hub gives"
        raise _refusal(model, what, error) from error
    architectures = config.architectures or []
    causal = all("CausalLM" in name or "LMHead" in name for name in architectures)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
        kind = ", ".join(architectures) or type(config).__name__
        what = f"is a {kind}, not a causal language model: choose one whose class ends in ForCausalLM"
        raise RunError(f"model.base {model.base!r} {what}")
    if towers := [name for name in TOWERS if vars(config).get(name)]:
        what = f"has {' and '.join(towers)} beside the language model: choose a base of text alone"
        raise RunError(f"model.base {model.base!r} {what}")
    if key := next((name for name in IN_PLACE if vars(config).get(name)), None):
        what = f"writes to its own weights ({key} in its config.json), which processes share"
        raise RunError(f"model.base {model.base!r} {what}: {IN_PLACE[key]}")
    return config


def empty_network(model: Model, config: Any | None = None) -> Any:
    """Makes the base's network without its weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(causal_config(model) if config is None else config, **_options(model))


def _origin(model: Model) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def _options(model: Model) -> dict[str, Any]:
    return {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attention}


def _register(config: Any, model: Model) -> None:
    """Registers the class that the base ships, at the recipe's revision, with transformers' AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    kind: Any = get_class_from_dynamic_module(config.auto_map[CAUSAL], model.base, revision=model.revision)
    kind.register_for_auto_class(CAUSAL)  # save_pretrained then copies its code too
    AutoModelForCausalLM.register(type(config), add_generation_mixin_to_remote_model(kind), exist_ok=True)


def _refusal(model: Model, what: str, error: Exception) -> RunError:
    what = f"{what}: {_first_line(error)}"
    if "trust_remote_code=True" in str(error):
        what = "needs model.trust_remote_code = true, which runs code that comes with the model"
    return RunError(f"model.base {model.base!r} {what}")


def read_base(model: Model) -> tuple[PackedBase, np.ndarray]:
    """Reads the base's weights from disk or the hub into one uint8 buffer; RunError if they cannot be used."""
    from transformers import AutoModelForCausalLM

    causal_config(model)
    try:
        options = {**_origin(model), **_options(model), "output_loading_info": True}
        network, loaded = AutoModelForCausalLM.from_pretrained(model.base, **options)
    except Exception as error:  # the base's own code may raise anything
        raise RunError(f"the weights of model.base {model.base!r} cannot be loaded: {_first_line(error)}") from error
    if loaded["missing_keys"]:  # transformers initializes them at random
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise RunError(f"the weights of model.base {model.base!r} are not whole: {missing} and others are missing")
    return _pack(network, model)


def _pack(network: Any, model: Model) -> tuple[PackedBase, np.ndarray]:
    persistent = network.state_dict()
    tensors = persistent | {name: buffer for name, buffer in network.named_buffers() if name not in persistent}
    index, offsets, end = dict[str, Entry](), dict[int, int](), 0  # tied tensors share their offset
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in offsets:
            offsets[tensor.data_ptr()] = end
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        dtype = str(tensor.dtype).removeprefix("torch.")
        index[name] = Entry(dtype, tuple(tensor.shape), offsets[tensor.data_ptr()], name in persistent)
    buffer = np.zeros(end, np.uint8)
    for name, tensor in tensors.items():
        _view(torch.from_numpy(buffer), index[name]).copy_(tensor)
    return PackedBase(model, None if model.trust_remote_code else network.config, index, end), buffer


def _view(buffer: torch.Tensor, entry: Entry) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    nbytes = int(np.prod(entry.shape)) * dtype.itemsize
    return buffer[entry.offset : entry.offset + nbytes].view(dtype).view(entry.shape)


def map_base(packed: PackedBase, buffer: torch.Tensor) -> Any:
    """Makes the network with its weights as views into `buffer` (uint8, on any device), without a copy."""
    with torch.device("meta"):
        network = empty_network(packed.model, packed.config)
    # `.data` has a version counter of its own; that of views is the buffer's, and PEFT raises it for experts' weights.
    tensors = {name: _view(buffer, entry).data for name, entry in packed.index.items()}
    network.load_state_dict({n: t for n, t in tensors.items() if packed.index[n].persistent}, assign=True)
    if len({entry.offset for entry in packed.index.values()}) < len(packed.index):
        network.tie_weights()  # not if the configuration says tied but the file holds two tensors
    for name, entry in packed.index.items():
        if not entry.persistent:  # such as rotary tables, which a state dict leaves out
            owner, _, leaf = name.rpartition(".")
            network.get_submodule(owner).register_buffer(leaf, tensors[name], persistent=False)
    return network.requires_grad_(False)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
