"""The trained part of a model, as one flat vector. Legend: P trained parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.config.sections import Lora, Model
from engine.models.adapters import with_adapters
from strategies.core.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trainable:
    """A network whose trained tensors are views into one flat vector `flat` (P,), float32 or wider, on its device.

    Their gradients are views into `grad` (P,). Switching to another client is one copy into `flat`. `initial` (P,) is
    the vector that the run starts from.
    """

    def __init__(self, network: PreTrainedModel, model: Model, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = with_adapters(network, model) if isinstance(model.peft, Lora) else network.requires_grad_(True)
        if model.compile:
            from transformers.modeling_layers import GradientCheckpointingLayer

            for layer in self.network.modules():
                if isinstance(layer, GradientCheckpointingLayer):  # transformers' base class of decoder layers
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
        self.originals: list[torch.Tensor] = []  # the base's own weights of adapted layers, see merged_base.py
        self.initial = self.flat.detach().cpu().clone()

    def adapted_layers(self) -> list[Any]:
        """Returns the base layers that have LoRA adapters, in the order of `layout.lora_pairs`."""
        pairs = self.layout.lora_pairs(self.flat.data)
        return [self.network.get_submodule(pair.name).base_layer for pair in pairs]

    def set_rank(self, rank: int | None) -> None:
        """Scales the adapters for a client of LoRA rank `rank`, or for the recipe's rank if None."""
        if rank == self.rank:  # almost always: saves a walk over the model
            return
        from peft.tuners.lora import LoraLayer

        self.rank = rank
        scale = self.layout.scale if rank is None else self.layout.scale_at(rank)
        for layer in self.network.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] = scale
