"""Reads a base model into one buffer that processes share, and maps a network onto that buffer.

Functions import transformers: it takes 220 MB and four seconds, and the command and the driver never need it.
"""

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models import quantized

ADAPTER = "adapter_config.json"  # the file by which PEFT knows an adapter
ALIGNMENT = 64  # bytes at which each tensor starts, as vector instructions need it
CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "ForSequenceClassification"  # ends the names of classes that score texts
SCORE = "score"  # their head, which scores the last token
LONGEST = 400  # characters of a library's message
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
    """What `map_base` needs beside the buffer: the model's configuration, the index of its tensors, and their wrapping.

    `config` is None for a base that ships its own code: unpickling it would need that code, which a process imports
    only when it reads the configuration of `model` itself. With `scores` the network gives one number for each text,
    and no logits of tokens.
    """

    model: Model
    config: Any | None  # a transformers PretrainedConfig
    index: Mapping[str, Entry]
    nbytes: int
    wrapped: Mapping[str, quantized.Wrapped] = field(default_factory=dict)
    scores: bool = False


def always_the_same_bits() -> None:
    """Makes torch and CUDA use deterministic kernels wherever they exist."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The default would write all allocated memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def causal_config(model: Model, *, scores: bool = False) -> Any:
    """Loads the base's configuration and registers its own code's class; RunError if it is no causal language model.

    With `scores` it may be a sequence classifier with one label, and transformers must have that class for it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    _refuse_adapter(model.base)
    try:
        config = AutoConfig.from_pretrained(model.base, **origin(model))
        if model.trust_remote_code and CAUSAL in (vars(config).get("auto_map") or {}):
            _register(config, model)
    except Exception as error:  # the base's own code may raise anything
        what = "is neither a folder with a config.json nor a model that the hub gives"
        raise refusal(model, what, error) from error
    architectures = config.architectures or []
    causal = all("CausalLM" in name or "LMHead" in name for name in architectures)
    if scores:
        _refuse_unscored(config, model)
        causal = causal or is_classifier(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
        kind = ", ".join(architectures) or type(config).__name__
        beside = config.get_text_config() is not config
        why = "which has a language model beside other parts" if beside else "not a causal language model"
        raise RunError(f"model.base {model.base!r} is a {kind}, {why}: choose one whose class ends in ForCausalLM")
    if towers := [name for name in TOWERS if vars(config).get(name)]:
        what = f"has {' and '.join(towers)} beside the language model: choose a base of text alone"
        raise RunError(f"model.base {model.base!r} {what}")
    if key := next((name for name in IN_PLACE if vars(config).get(name)), None):
        what = f"writes to its own weights ({key} in its config.json), which processes share"
        raise RunError(f"model.base {model.base!r} {what}: {IN_PLACE[key]}")
    return config


def is_classifier(config: Any) -> bool:
    """Whether a configuration is that of a model that scores texts already."""
    return any(name.endswith(CLASSIFIER) for name in config.architectures or [])


def _refuse_unscored(config: Any, model: Model) -> None:
    """Raises RunError for a family that transformers has no sequence classifier for, or one of several labels."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    family = f"model.base {model.base!r} is a {type(config).__name__.removesuffix('Config')}"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RunError(f"{family}, which has no {CLASSIFIER} class in transformers: choose a base of another family")
    if is_classifier(config) and config.num_labels != 1:
        raise RunError(f"{family} that classifies by {config.num_labels} labels: choose a base with one, or without")


def _refuse_adapter(base: str) -> None:
    """Raises RunError for a folder that a run, or PEFT, has written for `model.start`."""
    run, folder = Path(base), Path(base)
    if (run / "recipe.toml").is_file() and (run / "model").is_dir():
        folder = run / "model"
    elif not (folder / ADAPTER).is_file():
        return
    if not (folder / ADAPTER).is_file():
        raise RunError(f"model.base {base!r} is the folder of a run: set model.base to its model, {folder}")
    try:
        name = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        name = None
    what = f"model.base {base!r} is an adapter for the base {name!r}"
    raise RunError(f"{what}: set model.base to where that base is, and model.start to {base!r}")


def empty_network(model: Model, config: Any | None = None, *, scores: bool = False) -> Any:
    """Makes the base's network without its weights; RunError if the library that quantizes them is not there.

    With `scores` it is the sequence classifier over the same layers; RunError if its head is not linear.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = causal_config(model, scores=scores) if config is None else config
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    network = kind.from_config(_with_one_label(config) if scores else config, **_options(model, config))
    if scores and not isinstance(getattr(network, SCORE, None), nn.Linear):
        name = type(network).__name__
        raise RunError(f"model.base {model.base!r} would be a {name}, whose head is no linear layer: choose another")
    return quantized.with_quantized_layers(network, model)


def _with_one_label(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = deepcopy(config)
    config.num_labels = 1
    config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
    return config


def origin(model: Model) -> dict[str, Any]:
    """Makes the options by which transformers' from_pretrained finds the base's files."""
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def _options(model: Model, config: Any) -> dict[str, Any]:
    return {"dtype": getattr(torch, model.dtype), "attn_implementation": _attention(model, config)}


def _attention(model: Model, config: Any) -> str:
    """Returns the attention kernel; RunError for one that the base's class does not have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    has = {"eager": True, "sdpa": kind._supports_sdpa, "flash_attention_2": kind._supports_flash_attn}
    if model.attention == "auto":
        return "sdpa" if has["sdpa"] else "eager"
    if not has[model.attention]:
        able = ", ".join(f'"{name}"' for name, is_there in has.items() if is_there)
        what = f'model.attention is "{model.attention}", which {kind.__name__} does not have'
        raise RunError(f"{what}: leave it out, or take one of {able}")
    return model.attention


def _register(config: Any, model: Model) -> None:
    """Registers the class that the base ships, at the recipe's revision, with transformers' AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    kind: Any = get_class_from_dynamic_module(config.auto_map[CAUSAL], model.base, revision=model.revision)
    kind.register_for_auto_class(CAUSAL)  # save_pretrained then copies its code too
    AutoModelForCausalLM.register(type(config), add_generation_mixin_to_remote_model(kind), exist_ok=True)


def refusal(model: Model, what: str, error: Exception) -> RunError:
    """Makes the error that says what is wrong with the base, from what loading it has raised."""
    what = f"{what}: {reason(error)}"
    if "trust_remote_code=True" in str(error):
        what = "needs model.trust_remote_code = true, which runs code that comes with the model"
    return RunError(f"model.base {model.base!r} {what}")


def read_base(model: Model, *, scores: bool = False) -> tuple[PackedBase, np.ndarray]:
    """Reads the base's weights from disk or the hub, and quantizes them if the recipe says so, into one uint8 buffer.

    RunError if they cannot be used. With `scores` they may be a sequence classifier's; another base has no head yet.
    """
    model = model.weights
    network = load_base(model, causal_config(model, scores=scores))
    quantized.refuse_unusable(network, model)
    return pack(network, model, scores=scores)


def load_base(model: Model, config: Any) -> Any:
    """Loads the base as transformers does, of the class that its configuration names; RunError if it is not whole."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if is_classifier(config) else AutoModelForCausalLM
    options = {**origin(model), **_options(model, config), **quantized.loading_options(model)}
    try:
        network, loaded = kind.from_pretrained(model.base, output_loading_info=True, **options)
    except Exception as error:  # the base's own code may raise anything
        raise RunError(f"the weights of model.base {model.base!r} cannot be loaded: {reason(error)}") from error
    if loaded["missing_keys"]:  # transformers initializes them at random
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise RunError(f"the weights of model.base {model.base!r} are not whole: {missing} and others are missing")
    return network


def pack(network: Any, model: Model, *, scores: bool = False) -> tuple[PackedBase, np.ndarray]:
    """Copies a network's tensors into one uint8 buffer."""
    persistent, wrapped = quantized.plain_tensors(network)
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
    config = None if model.trust_remote_code else network.config
    return PackedBase(model, config, index, end, wrapped, scores), buffer


def _view(buffer: torch.Tensor, entry: Entry) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    nbytes = int(np.prod(entry.shape)) * dtype.itemsize
    return buffer[entry.offset : entry.offset + nbytes].view(dtype).view(entry.shape)


def map_base(packed: PackedBase, buffer: torch.Tensor) -> Any:
    """Makes the network with its weights as views into `buffer` (uint8, on any device), without a copy.

    A head of one score that the base does not have stays on the meta device.
    """
    with torch.device("meta"):
        network = empty_network(packed.model, packed.config, scores=packed.scores)
    # `.data` has a version counter of its own; that of views is the buffer's, and PEFT raises it for experts' weights.
    tensors = {name: _view(buffer, entry).data for name, entry in packed.index.items()}
    persistent = {name: tensor for name, tensor in tensors.items() if packed.index[name].persistent}
    state = quantized.put_together(network, packed.model, persistent, packed.wrapped)
    missing, _ = network.load_state_dict(state, strict=not packed.scores, assign=True)
    if others := sorted(set(missing) - {f"{SCORE}.weight"}):
        raise RunError(
            f"model.base {packed.model.base!r} has no {others[0]} for a score's network: choose another base"
        )
    if len({entry.offset for entry in packed.index.values()}) < len(packed.index):
        network.tie_weights()  # not if the configuration says tied but the file holds two tensors
    for name, entry in packed.index.items():
        if not entry.persistent:  # such as rotary tables, which a state dict leaves out
            owner, _, leaf = name.rpartition(".")
            network.get_submodule(owner).register_buffer(leaf, tensors[name], persistent=False)
    return network.requires_grad_(False)


def reason(error: BaseException) -> str:
    """Returns a library's whole message in one line, and what the hub says of a base that it does not give."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            said = " ".join((cause.server_message or str(cause)).split()).rstrip(".")
            return f"{said}; ask for access on its page, and set HF_TOKEN"
        if isinstance(cause, LocalEntryNotFoundError):
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
            return f"{why}, and it is not among the files that have been downloaded"
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split()).rstrip(".")
    if not text or not isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def compute_in(network: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Makes the network's forward and backward passes, and its generation, compute in `dtype` by torch's autocast.

    What loses by it, such as sums and softmaxes, stays as it is, and so do weights and gradients.
    """
    from peft import PeftModel

    inner = network.get_base_model() if isinstance(network, PeftModel) else network  # which generates past PeftModel
    forward = inner.forward

    @wraps(forward)
    def cast(*arguments: Any, **options: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*arguments, **options)

    inner.forward = cast
