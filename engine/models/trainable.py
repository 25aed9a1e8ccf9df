"""The trained part of a model, as one flat vector. Legend: P trained parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config.sections import Model
from engine.messages.shards import borrow
from engine.models.adapters import is_linear, is_transposed, with_adapters
from engine.models.seeded import Seeded
from strategies.core.layout import LORA_A, Layout
from strategies.core.protocol import Vector


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Returns the shape of the whole parameter, also where a rank of a gang holds a slice."""
    return tuple(vars(parameter).get("ds_shape", parameter.shape))


def trained_layout(network: nn.Module, model: Model) -> Layout:
    """Makes the layout of the flat vector of trained parameters, with whole shapes where ranks hold slices."""
    trained = {name: shape_of(p) for name, p in network.named_parameters() if p.requires_grad}
    layers: list[Any] = [network.get_submodule(name.split(LORA_A)[0]) for name in trained if LORA_A in name]
    scales: list[float] = [layer.scaling["default"] for layer in layers]
    differ = tuple(scales) if len(set(scales)) > 1 else ()
    choices: int = getattr(network, "choices", 0)
    return Layout(tuple(trained), tuple(trained.values()), scales[0] if scales else 1.0, differ, choices)


class Trainable:
    """A network whose trained tensors are views into one flat vector `flat` (P,), float32 or wider, on its device.

    Their gradients are views into `grad` (P,). Switching to another client is one copy into `flat`. `initial` (P,) is
    the vector that the run starts from.
    """

    def __init__(self, network: Any, model: Model, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = with_adapters(network, model, seed)
        if model.compile:
            from transformers.modeling_layers import GradientCheckpointingLayer

            for layer in self.network.modules():
                if isinstance(layer, GradientCheckpointingLayer):  # transformers' base class of decoder layers
                    layer.compile(dynamic=True)
        self.layout = trained_layout(self.network, model)
        trained = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        precision = torch.promote_types(trained[0][1].dtype, torch.float32)
        self.flat = nn.Parameter(torch.cat([p.detach().reshape(-1).to(precision) for _, p in trained]))
        self.grad = torch.zeros_like(self.flat)
        self.flat.grad = self.grad
        values, grads = self.layout.views(self.flat.data), self.layout.views(self.grad)
        for name, parameter in trained:
            parameter.data, parameter.grad = values[name], grads[name]
        self.lora_rank: int | None = None
        self.merged = False  # whether the adapted layers have other weights than the base's
        self.initial = self.flat.detach().cpu().clone()
        self.originals = [layer.weight.data for layer in self.adapted_layers()]  # what the base itself has there

    def become(self, vector: Vector) -> None:
        """Puts a vector (P,) into the model."""
        self.flat.data.copy_(vector)

    def adapted_layers(self) -> list[Any]:
        """Returns the linear base layers that have LoRA adapters, in the order of `layout.lora_pairs`."""
        layers = (self.network.get_submodule(pair.name).base_layer for pair in self.layout.lora_pairs(self.flat.data))
        return [layer for layer in layers if is_linear(layer)]

    def set_lora_rank(self, lora_rank: int | None) -> None:
        """Scales the adapters for a client of rank `lora_rank`, or for the recipe's rank if None."""
        if lora_rank == self.lora_rank:  # almost always: saves a walk over the model
            return
        from peft.tuners.lora import LoraLayer

        self.lora_rank = lora_rank
        scale = self.layout.scale if lora_rank is None else self.layout.scale_at(lora_rank)
        for layer in self.network.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] = scale

    def merge_weights(self, merged_delta: np.ndarray) -> np.ndarray:
        """Adds `merged_delta` (float32, the products in order) to the adapted layers' weights; as uint8 bytes."""
        weights, products = [], self.layout.products(borrow(merged_delta))
        for layer, weight, product_OI in zip(self.adapted_layers(), self.originals, products, strict=True):
            product = product_OI.T if is_transposed(layer) else product_OI
            changed = weight.float() + product.to(weight.device)
            weights.append(changed.to(weight.dtype).reshape(-1).view(torch.uint8).cpu())
        return torch.cat(weights).numpy()

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Points the adapted layers at the base's weights, and afterwards back at what a rule has merged."""
        layers = self.adapted_layers() if self.merged else []
        weights = [layer.weight.data for layer in layers]
        for layer, original in zip(layers, self.originals, strict=False):
            layer.weight.data = original
        try:
            yield
        finally:
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.data = weight

    def use_merged(self, merged: torch.Tensor | None) -> None:
        """Points the adapted layers at `merged` (uint8, from `merge_weights`), or at the base's weights if None."""
        flat_weights = self.originals if merged is None else merged.split([weight.nbytes for weight in self.originals])
        for layer, original, flat in zip(self.adapted_layers(), self.originals, flat_weights, strict=True):
            layer.weight.data = flat.view(original.dtype).view(original.shape)
        self.merged = merged is not None


def trainable_of(network: Any, model: Model, seed: int) -> Trainable | Seeded:
    """Makes the trainable of the recipe's kind; `seed` draws what is new in it."""
    return (Seeded if model.peft.replays else Trainable)(network, model, seed)
