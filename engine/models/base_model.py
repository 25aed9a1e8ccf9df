"""The base model as one shared buffer, and what is trained on it as one flat vector. Legend: P trained parameters.

transformers and peft are imported where they are used: they take 220 MB and four seconds, which the command and the
driver, who know this module too, never need.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from engine.config.sections import Lora, Model
from strategies.core.layout import Layout

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIGNMENT = 64  # bytes: what vector instructions want of a tensor's first element
CAUSAL = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Entry:
    """One tensor of a packed base: its type and shape, and where in the buffer its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    persistent: bool


@dataclass(frozen=True)
class PackedBase:
    """All that is needed beside the buffer to make the model again: its configuration and the index of its tensors.

    A base with code of its own has no `config` here: to receive it, a process would have to know that code already, and
    comes to know it where it reads the configuration of `model`.
    """

    model: Model
    config: Any | None  # a transformers PretrainedConfig
    index: Mapping[str, Entry]
    nbytes: int


def always_the_same_bits() -> None:
    """Lets torch and CUDA choose kernels whose result does not depend on chance, where there are any."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else all that is allocated would be written twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer; a missing pad token becomes its end token. ValueError without tokenizer or end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # of the code that comes with it, any
        raise _refusal(model, "has no tokenizer that can be loaded", error) from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of model.base {model.base!r} is no fast one: convert it to a tokenizer.json")
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of model.base {model.base!r} has no end token, which fine-tuning needs")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def causal_config(model: Model) -> Any:
    """The base's transformers configuration; ValueError when it is none of a causal language model.

    Where the recipe trusts the code that comes with the base, transformers knows its class from then on.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if model.trust_remote_code and CAUSAL in (vars(config).get("auto_map") or {}):
            _register(config, model)
    except Exception as error:  # of the code that comes with it, any
        what = "is neither a folder with a config.json nor a model that the hub gives"
        raise _refusal(model, what, error) from error
    architectures = config.architectures or []
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or any(
        "CausalLM" not in a and "LMHead" not in a for a in architectures
    ):
        kind = ", ".join(architectures) or type(config).__name__
        raise ValueError(
            f"model.base {model.base!r} is a {kind}, not a causal language model: "
            f"choose one whose class ends in ForCausalLM"
        )
    return config


def _register(config: Any, model: Model) -> None:
    """Makes transformers take the class that comes with a base, of the same revision, wherever it is asked for one."""
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    kind: Any = get_class_from_dynamic_module(config.auto_map[CAUSAL], model.base, revision=model.revision)
    kind.register_for_auto_class(CAUSAL)  # a whole model is exported with its code
    AutoModelForCausalLM.register(type(config), add_generation_mixin_to_remote_model(kind), exist_ok=True)


def _refusal(model: Model, what: str, error: Exception) -> ValueError:
    if "trust_remote_code=True" in str(error):
        what = "needs model.trust_remote_code = true, which runs code that comes with the model"
        return ValueError(f"model.base {model.base!r} {what}")
    return ValueError(f"model.base {model.base!r} {what}: {_first_line(error)}")


def read_base(model: Model) -> tuple[PackedBase, np.ndarray]:
    """Reads the base's weights from disk or the hub into one uint8 buffer; ValueError when it is no causal model."""
    from transformers import AutoModelForCausalLM

    causal_config(model)
    try:
        network, loaded = AutoModelForCausalLM.from_pretrained(
            model.base,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attention,
            output_loading_info=True,
        )
    except Exception as error:  # of the code that comes with it, any
        raise ValueError(f"the weights of model.base {model.base!r} cannot be loaded: {_first_line(error)}") from error
    if loaded["missing_keys"]:  # transformers would draw them at random
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ValueError(f"the weights of model.base {model.base!r} are not whole: {missing} and others are missing")
    return _pack(network, model)


def _pack(network: PreTrainedModel, model: Model) -> tuple[PackedBase, np.ndarray]:
    persistent = network.state_dict()
    tensors = persistent | {name: buffer for name, buffer in network.named_buffers() if name not in persistent}
    index: dict[str, Entry] = {}
    offsets: dict[int, int] = {}  # tied tensors share their bytes
    end = 0
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in offsets:
            offsets[tensor.data_ptr()] = end
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        dtype = str(tensor.dtype).removeprefix("torch.")
        index[name] = Entry(dtype, tuple(tensor.shape), offsets[tensor.data_ptr()], name in persistent)
    buffer = np.zeros(end, np.uint8)
    for name, tensor in tensors.items():
        target = _view(torch.from_numpy(buffer), index[name])
        target.copy_(tensor)
    return PackedBase(model, None if model.trust_remote_code else network.config, index, end), buffer


def _view(buffer: torch.Tensor, entry: Entry) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    nbytes = int(np.prod(entry.shape)) * dtype.itemsize
    return buffer[entry.offset : entry.offset + nbytes].view(dtype).view(entry.shape)


def map_base(packed: PackedBase, buffer: torch.Tensor) -> PreTrainedModel:
    """The model whose weights are views into `buffer` (uint8, on any device): no copy, no initialisation."""
    from transformers import AutoModelForCausalLM

    model, config = packed.model, packed.config if packed.config is not None else causal_config(packed.model)
    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, model.dtype), attn_implementation=model.attention
        )
    tensors = {name: _view(buffer, entry) for name, entry in packed.index.items()}
    network.load_state_dict({n: t for n, t in tensors.items() if packed.index[n].persistent}, assign=True)
    if len({entry.offset for entry in packed.index.values()}) < len(packed.index):
        network.tie_weights()  # but not where a configuration says tied, and the weights are two
    for name, entry in packed.index.items():
        if not entry.persistent:  # the rotary tables and their like, which no state dict holds
            owner, _, leaf = name.rpartition(".")
            network.get_submodule(owner).register_buffer(leaf, tensors[name], persistent=False)
    return network.requires_grad_(False)


class Trainable:
    """A model whose trained tensors are views into one flat float32 vector, and their gradients into another.

    To become another client is one copy into `flat` (P,). `initial` is the vector the federation starts from.
    """

    def __init__(self, network: PreTrainedModel, model: Model, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = with_adapters(network, model) if isinstance(model.peft, Lora) else network.requires_grad_(True)
        if model.compile:
            from transformers.modeling_layers import GradientCheckpointingLayer

            for layer in self.network.modules():
                if isinstance(layer, GradientCheckpointingLayer):  # transformers' base of all that come in a row
                    layer.compile(dynamic=True)
        trained = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        scale = model.peft.alpha / model.peft.r if isinstance(model.peft, Lora) else 1.0
        self.layout = Layout.of(trained, scale)
        device = trained[0][1].device
        precision = torch.promote_types(trained[0][1].dtype, torch.float32)
        self.flat = nn.Parameter(torch.cat([p.detach().reshape(-1).to(precision) for _, p in trained]).to(device))
        self.grad = torch.zeros_like(self.flat)
        self.flat.grad = self.grad
        values, grads = self.layout.views(self.flat.data), self.layout.views(self.grad)
        for name, parameter in trained:
            parameter.data, parameter.grad = values[name], grads[name]
        self.rank: int | None = None
        self.originals: list[torch.Tensor] = []  # the adapted layers' first weights, once others have been used
        self.initial = self.flat.detach().cpu().clone()

    def adapted_layers(self) -> list[Any]:
        """The base's layers that have LoRA adapters, in the order of `layout.lora_pairs`."""
        pairs = self.layout.lora_pairs(self.flat.data)
        return [self.network.get_submodule(pair.name).base_layer for pair in pairs]

    def set_rank(self, rank: int | None) -> None:
        """Scales the adapters as those of a client of `rank` are, None: as the recipe says; the rest is zeros."""
        if rank == self.rank:  # as nearly always: a client costs no walk over the model
            return
        from peft.tuners.lora import LoraLayer

        self.rank = rank
        scale = self.layout.scale if rank is None else self.layout.scale_at(rank)
        for layer in self.network.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] = scale


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a matrix and a bias: torch's own, or transformers' with its weights the other way round."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weights as (I, O), as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def with_adapters(network: PreTrainedModel, model: Model) -> PeftModel:
    """The network with the recipe's LoRA adapters, drawn from torch's present seed; ValueError for unknown layers."""
    from peft import get_peft_model

    assert isinstance(model.peft, Lora)
    linear = sorted({name.rsplit(".")[-1] for name, module in network.named_modules() if is_linear(module)})
    try:
        return get_peft_model(network, lora_config(model))
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise ValueError(
            f"model.peft.targets {model.peft.targets!r} matches no layer of {model.base!r}, "
            f'whose linear layers are {", ".join(linear)} (or write "all-linear")'
        ) from error


def lora_config(model: Model) -> LoraConfig:
    """The adapter's configuration as PEFT writes it beside the weights."""
    from peft import LoraConfig

    assert isinstance(model.peft, Lora)
    targets = model.peft.targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.base,
        revision=model.revision,
        r=model.peft.r,
        lora_alpha=model.peft.alpha,
        lora_dropout=model.peft.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
