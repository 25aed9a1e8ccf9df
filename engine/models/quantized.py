"""Quantized bases: layers of bitsandbytes and weights of torchao, made of plain tensors that processes share."""

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.config.quantize import KEY, Quantize, not_installed
from engine.config.sections import Model
from engine.messages.errors import RunError

ON_CPU = {"": "cpu"}  # transformers' device map
READ_PAST = {"mamba": "dt_proj"}  # layers whose weights transformers multiplies itself, also where they are quantized
Tensors = dict[str, torch.Tensor]


class Wrapped(NamedTuple):
    """A weight of torchao: its class, what that needs beside its plain tensors, and the names of these."""

    kind: Any
    attributes: Any
    shape: torch.Size
    stride: tuple[int, ...]
    parts: tuple[str, ...]


def quantization_config(quantize: Quantize) -> Any:
    """Makes transformers' configuration; RunError if the library is not there."""
    import transformers

    library = quantize.kind
    logging.getLogger(library).setLevel(logging.ERROR)  # they warn of every cast, and of kernels for other machines
    try:
        import_module(library)
    except ImportError:
        raise not_installed(library) from None
    return getattr(transformers, quantize.config_class)(**quantize.options())


def loading_options(model: Model) -> dict[str, Any]:
    """Makes the options by which from_pretrained quantizes: on the CPU, which gives the same bits on every machine."""
    if model.quantize is None:
        return {}
    return {"quantization_config": quantization_config(model.quantize), "device_map": ON_CPU}


def refuse_unusable(network: Any, model: Model) -> None:
    """Raises RunError for a loaded base whose files are quantized already, or whose embeddings would be."""
    quantizer = getattr(network, "hf_quantizer", None)
    if quantizer is None:
        return
    if quantizer.pre_quantized:
        raise RunError(
            f"the weights of model.base {model.base!r} are quantized already: set model.base to the model that they "
            f"were made from, and let {KEY} quantize it"
        )
    if layer := READ_PAST.get(network.config.model_type):
        weights = [name for name, _ in network.named_parameters() if name.endswith(f"{layer}.weight")]
        if any(quantizer.param_needs_quantization(network, name) for name in weights):
            what = f"{KEY} cannot quantize {layer}, whose weight the model reads past the layer"
            raise RunError(f"{what}: name it among the layers that are skipped")
    for name in network.all_tied_weights_keys:
        if quantizer.param_needs_quantization(network, name):
            layer = name.removesuffix(".weight")
            raise RunError(f"{KEY} cannot quantize {layer}, whose weight is the embeddings' too: name it as skipped")


def with_quantized_layers(network: Any, model: Model) -> Any:
    """Replaces the layers of a network without weights by quantized ones, if the recipe quantizes the base."""
    if model.quantize is None:
        return network
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization_config(model.quantize), pre_quantized=False)
    quantizer.preprocess_model(model=network, dtype=network.dtype, device_map=ON_CPU)
    network.hf_quantizer = quantizer
    quantizer.postprocess_model(network)
    return network


def quantized_bytes(network: Any, quantize: Quantize) -> float:
    """Counts the bytes that the weights of a network without weights will take, with their scales."""
    quantizer, total = network.hf_quantizer, 0.0
    for name, parameter in network.named_parameters():
        total += parameter.numel() * quantizer.param_element_size(network, name, parameter)
        if quantizer.param_needs_quantization(network, name):
            total += quantize.scale_bytes(parameter.numel(), len(parameter))
    return total


def plain_tensors(network: Any) -> tuple[Tensors, dict[str, Wrapped]]:
    """Returns the state dict with torchao's weights taken apart, and how to put them together again."""
    tensors, wrapped = Tensors(), dict[str, Wrapped]()
    for name, tensor in network.state_dict().items():
        if is_traceable_wrapper_subclass(tensor):
            parts, attributes = tensor.__tensor_flatten__()
            wrapped[name] = Wrapped(type(tensor), attributes, tensor.shape, tensor.stride(), tuple(parts))
            tensors |= {f"{name}.{part}": getattr(tensor, part) for part in parts}
        else:
            tensors[name] = tensor
    return tensors, wrapped


def put_together(network: Any, model: Model, tensors: Tensors, wrapped: Mapping[str, Wrapped]) -> Tensors:
    """Makes the state dict for a network with quantized layers from its plain tensors, without a copy of any."""
    state = dict(tensors)
    for name, (kind, attributes, shape, stride, parts) in wrapped.items():
        inner = {part: state.pop(f"{name}.{part}") for part in parts}
        state[name] = kind.__tensor_unflatten__(inner, attributes, shape, stride)
    if model.quantize is not None and model.quantize.kind == "bitsandbytes":
        _fill_bitsandbytes(network, state)
    return state


def _fill_bitsandbytes(network: Any, state: Tensors) -> None:
    """Gives bitsandbytes' layers their weights, and takes out of `state` what a state dict cannot load into them."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, layer in network.named_modules():
        key = f"{name}.weight"
        if isinstance(layer, Linear4bit):
            scales = {each: state.pop(each) for each in list(state) if each.startswith(f"{key}.")}
            weight, device = state[key], state[key].device
            layer.weight = Params4bit.from_prequantized(weight, scales, device=device, module=layer)
            # Else each process copies its weights into another order to evaluate, where the CPU knows bfloat16.
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, Linear8bitLt):
            weight, scale = state[key], state.pop(f"{name}.SCB")
            layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scale)
            del state[f"{name}.weight_format"]
        else:
            continue
        state[key] = layer.weight
