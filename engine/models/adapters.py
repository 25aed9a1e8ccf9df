"""The adapters that PEFT adds to a base, made from the recipe; a new kind of adapter is added here."""

from collections import Counter
from typing import Any

from torch import nn

from engine.config.federation import Federation
from engine.config.sections import Lora, Model
from engine.messages.errors import RunError
from strategies.core.base import named


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: torch's nn.Linear, or transformers' Conv1D with its transposed weight."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer stores its weight as (inputs, outputs), as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def with_adapters(network: Any, model: Model) -> Any:
    """Adds the recipe's LoRA adapters to the network, initialized from torch's seed; RunError for unknown layers."""
    from peft import get_peft_model

    assert isinstance(model.peft, Lora)
    linear = sorted({name.rsplit(".")[-1] for name, module in network.named_modules() if is_linear(module)})
    try:
        return get_peft_model(network, lora_config(model))
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise RunError(
            f"model.peft.targets {model.peft.targets!r} matches no layer of {model.base!r}, "
            f'whose linear layers are {", ".join(linear)} (or write "all-linear")'
        ) from error


def lora_config(model: Model) -> Any:
    """Makes PEFT's configuration of the adapter."""
    from peft import LoraConfig

    peft = model.peft
    assert isinstance(peft, Lora)
    origin = {"task_type": "CAUSAL_LM", "base_model_name_or_path": model.base, "revision": model.revision}
    sizes = {"r": peft.r, "lora_alpha": peft.alpha, "lora_dropout": peft.dropout}
    targets = peft.targets if isinstance(peft.targets, str) else list(peft.targets)
    return LoraConfig(**origin, **sizes, target_modules=targets)


def refuse_other_adapters(network: nn.Module, federation: Federation) -> None:
    """Raises RunError if the strategy works on A and B of linear layers, and something else is trained."""
    strategy, peft = federation.strategy, federation.model.peft
    if not isinstance(peft, Lora) or not (strategy.needs_lora or strategy.merges_into_base or strategy.sends_products):
        return
    places = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    for name in (name for name, parameter in network.named_parameters() if parameter.requires_grad):
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
