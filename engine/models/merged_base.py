"""A base that a rule has merged products into: made once per node, then mapped by the slots in its place."""

import numpy as np
import torch

from engine.messages.shards import borrow
from engine.models.base_model import Trainable, is_transposed


def merged_weights(trainable: Trainable, residual: np.ndarray) -> np.ndarray:
    """The adapted layers' weights plus the products of `residual`, one after another, as bytes (uint8)."""
    parts = []
    for weight, product_OI in zip(_originals(trainable), _products(trainable, residual), strict=True):
        changed = weight.float() + product_OI.to(weight.device)
        parts.append(changed.to(weight.dtype).reshape(-1).view(torch.uint8).cpu())
    return torch.cat(parts).numpy()


def use_weights(trainable: Trainable, merged: torch.Tensor | None) -> None:
    """Lets the adapted layers look at `merged` (uint8, from `merged_weights`) or, with None, at the first base."""
    originals, offset = _originals(trainable), 0
    for layer, weight in zip(trainable.adapted_layers(), originals, strict=True):
        if merged is None:
            layer.weight.data = weight
            continue
        layer.weight.data = merged[offset : offset + weight.nbytes].view(weight.dtype).view(weight.shape)
        offset += weight.nbytes


def _originals(trainable: Trainable) -> list[torch.Tensor]:
    """The first base's weights, remembered when they are asked for the first time."""
    if not trainable.originals:
        trainable.originals = [layer.weight.data for layer in trainable.adapted_layers()]
    return trainable.originals


def _products(trainable: Trainable, residual: np.ndarray) -> list[torch.Tensor]:
    """The products in the orientation of the layers' weights: GPT-2's Conv1D keeps (I, O)."""
    products = trainable.layout.products(borrow(residual))
    layers = trainable.adapted_layers()
    return [p.T if is_transposed(layer) else p for p, layer in zip(products, layers, strict=True)]
