"""The adapters that PEFT adds to a base, made from the recipe; a new kind of adapter is added here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from engine.config.sections import Lora, Model
from engine.messages.errors import RunError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: torch's nn.Linear, or transformers' Conv1D with its transposed weight."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer stores its weight as (inputs, outputs), as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def with_adapters(network: PreTrainedModel, model: Model) -> PeftModel:
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


def lora_config(model: Model) -> LoraConfig:
    """Makes PEFT's configuration of the adapter, which is also saved beside its weights."""
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
