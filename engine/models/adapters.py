"""The adapters that PEFT adds to a base, made from the recipe. A new kind is a class in engine/config/adapters.py."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from engine.config.federation import Federation, works_on_pairs
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.base_model import SCORE
from engine.models.ends import train_ends
from engine.models.prefixed import Prefixed
from strategies.core.base import named

# PEFT refuses out_proj in these models, as fused kernels read its weights past the layer.
STATE_SPACES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
HEAD_STD = 0.02  # of a new head's weights
HEAD = f"base_model.model.{SCORE}.modules_to_save.default.weight"  # as PEFT names a head that is trained with adapters


def is_linear(layer: nn.Module | None) -> bool:
    """Whether a layer is linear: torch's nn.Linear, or transformers' Conv1D with its transposed weight."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module | None) -> bool:
    """Whether a linear layer stores its weight as (inputs, outputs), as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def with_adapters(network: Any, model: Model, seed: int = 0) -> Any:
    """Freezes the network and adds the recipe's adapters, initialized from torch's seed; without any, all is trained.

    A head of one score is trained too. RunError if the network cannot have adapters, or a part of model.peft matches
    nothing.
    """
    from peft import get_peft_model

    if (head := score_head(network)) is not None:
        begin_head(network)
    if model.peft.plugs_in:
        return train_ends(network, model)
    if model.peft.peft_class is None:
        return network.requires_grad_(True)
    if model.peft.virtual_tokens:
        return Prefixed(network, model.peft, seed)
    modules, parameters = ([name for name, _ in each] for each in (network.named_modules(), network.named_parameters()))
    layers = [name for name, layer in network.named_modules() if is_linear(layer)]
    _check_expression(model, modules)
    _refuse_quantized(model, network)
    try:
        with warnings.catch_warnings():
            # PEFT warns of patterns that it derives itself for experts' weights; the recipe's are checked below.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            config = peft_config(model, scores=head is not None)
            if model.peft.options().get("target_modules") == "all-linear" and (unfit := unfit_layers(network)):
                config.exclude_modules = unfit
            adapted = get_peft_model(network.requires_grad_(False), config)
    except ValueError as error:
        raise _refusal(model, error, network, layers) from error
    options = model.peft.options()
    # PEFT takes the names of experts' layers for the parameters that hold them all: those it has matched.
    targets = set(_listed(options, "target_modules")) & set(
        _listed(vars(adapted.peft_config["default"]), "target_modules")
    )
    _check_matches(model, "targets", targets, modules, _linear(layers))
    _check_matches(model, "modules_to_save", _listed(options, "modules_to_save"), modules, _linear(layers))
    _check_matches(model, "target_parameters", _listed(options, "target_parameters"), parameters, "")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in options.get(key, {}):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules):
                raise RunError(f"model.peft.{key}: {pattern!r} matches no layer of {model.base!r}, {_linear(layers)}")
    return adapted


def score_head(network: nn.Module) -> Any:
    """Returns the head of a network that gives one score for each text; None for a language model."""
    return vars(network)["_modules"].get(SCORE)


def begin_head(network: Any) -> None:
    """Gives the network a new linear head if the base has none; a head takes activations of any type."""
    head, device = score_head(network), network.get_input_embeddings().weight.device
    weight = drawn_head(head.in_features)  # always, so that the adapters' draws are the same
    if head.weight.is_meta:
        head = nn.Linear(head.in_features, 1, bias=False, device="meta")
        head.weight = nn.Parameter(weight.to(device))
        setattr(network, SCORE, head)
    head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),))


def drawn_head(width: int) -> torch.Tensor:
    """Draws the weights (1, width) of a new head, N(0, 0.02), by torch's seed, the same on every device."""
    return torch.normal(0.0, HEAD_STD, (1, width), device="cpu")


def unfit_layers(network: Any) -> list[str]:
    """The last parts of the names of linear layers that "all-linear" leaves out, since no adapter works there.

    A router may give more than one tensor; the weights of some layers of state spaces are read past the layer.
    """
    names = set()
    for name, layer in network.named_modules():
        end = name.rpartition(".")[2]
        reads_weight = end == "dt_proj" or (end == "out_proj" and network.config.model_type in STATE_SPACES)
        if is_linear(layer) and (reads_weight or "Router" in type(layer).__name__):
            names.add(end)
    return sorted(names)


def peft_config(model: Model, *, scores: bool = False) -> Any:
    """Makes PEFT's configuration of the adapter, which holds the head too if the network `scores` texts."""
    import peft

    task = "SEQ_CLS" if scores else "CAUSAL_LM"
    origin = {"task_type": task, "base_model_name_or_path": model.base, "revision": model.revision}
    assert model.peft.peft_class is not None
    return getattr(peft, model.peft.peft_class)(**origin, **model.peft.options())


def _check_expression(model: Model, modules: list[str]) -> None:
    """Raises RunError if `targets` is text that is no regular expression of whole names of modules."""
    targets = model.peft.options().get("target_modules")
    if not isinstance(targets, str) or targets == "all-linear":
        return
    key = f"model.peft.targets = {targets!r}"
    try:
        expression = re.compile(targets)
    except re.error as error:
        raise RunError(
            f'{key} is no regular expression ({error}): for names write a list, such as ["q_proj"]'
        ) from error
    if not any(map(expression.fullmatch, modules)):
        hint = f"[{targets!r}]".replace("'", '"') if any(_ends(name, targets) for name in modules) else '["q_proj"]'
        raise RunError(
            f"{key} is text, and so a regular expression of whole names, which matches no layer of {model.base!r}: "
            f"for last parts of names write a list, such as {hint}"
        )


def _refuse_quantized(model: Model, network: Any) -> None:
    """Raises RunError if weights in few bits are to be trained themselves, or products added to them."""
    quantizer, options = getattr(network, "hf_quantizer", None), model.peft.options()
    if quantizer is None:
        return
    names = [name for name, _ in network.named_parameters() if quantizer.param_needs_quantization(network, name)]
    for key in ("modules_to_save", "target_parameters"):
        for wanted in _listed(options, key):
            if any(f".{wanted}." in f".{name}." for name in names):
                raise RunError(
                    f"model.peft.{key}: the weights of {wanted!r} are quantized (model.quantize), and only floating "
                    f"point numbers can be trained: leave it out, or name it among the layers that are not quantized"
                )


def _check_matches(model: Model, key: str, wanted: Iterable[str], names: list[str], hint: str) -> None:
    for name in sorted(wanted):
        if not any(_ends(each, name) for each in names):
            what = "parameter" if key == "target_parameters" else "layer"
            raise RunError(f"model.peft.{key}: {name!r} matches no {what} of {model.base!r}{hint and ', '}{hint}")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _listed(options: dict[str, Any], key: str) -> list[str]:
    """The names under a key; none if it is missing or a regular expression."""
    value = options.get(key) or ()
    return [] if isinstance(value, str) else list(value)


def _linear(layers: list[str]) -> str:
    names = sorted({name.rsplit(".")[-1] for name in layers})
    return f'whose linear layers are {", ".join(names)} (or write "all-linear")'


def _refusal(model: Model, error: ValueError, network: Any, layers: list[str]) -> RunError:
    """PEFT's refusal in a sentence that names the recipe's keys."""
    said, key = str(error).strip(), f"model.peft of kind {model.peft.kind!r}"
    if "not found in the base model" in said:
        beside = model.peft.options().get("layers_to_transform")
        where = f" in the layers {list(beside)} (layers_to_transform)" if beside else ""
        targets = model.peft.options().get("target_modules")
        return RunError(f"model.peft.targets {targets!r} matches no layer of {model.base!r}{where}, {_linear(layers)}")
    if "Please specify `target_modules`" in said:
        norms = (name for name, layer in network.named_modules() if "norm" in type(layer).__name__.lower())
        names = ", ".join(sorted({name.rsplit(".")[-1] for name in norms}))
        which = f"whose norm layers are {names}" if model.peft.adapts == "norm" else _linear(layers)
        return RunError(f"{key} has no layers that PEFT knows for {model.base!r}, {which}: name them in targets")
    if "incompatible with Mamba" in said:
        return RunError(
            f"model.peft.targets names out_proj, whose adapter the fused kernels of {model.base!r} pass by: leave it "
            f'out, or write "all-linear", which does'
        )
    return RunError(f"{key} cannot be added to {model.base!r}: {said.rstrip('.')}")


def refuse_other_adapters(network: nn.Module, federation: Federation) -> None:
    """Raises RunError if the strategy works on A and B of linear layers, and something else is trained."""
    strategy, peft = federation.strategy, federation.model.peft
    if peft.peft_class is None or not works_on_pairs(strategy):
        return
    places = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    for name in (name for name, parameter in network.named_parameters() if parameter.requires_grad):
        if federation.scores and name == HEAD:  # these rules average other tensors as they are
            continue
        module, marker, rest = name.partition(".lora_")
        layer: Any = network.get_submodule(module).base_layer if marker else None
        if layer is None or not is_linear(layer) or not rest.startswith(("A.", "B.")):
            why = "something else is trained in"
        elif strategy.merges_into_base and places[id(layer.weight)] > 1:
            why = "it changes the base's weights, and another layer shares those of"
        else:
            continue
        raise RunError(
            f"{named(strategy)} works on the two matrices of linear layers' adapters, and {why} "
            f'{module.removeprefix("base_model.model.")}: leave it out of model.peft.targets, or use "fedavg"'
        )
