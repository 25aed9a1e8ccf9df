"""A base with a merged delta: one process per node makes its weights, and the slots map them instead of the base's."""

import numpy as np
import torch

from engine.messages.shards import borrow
from engine.models.adapters import is_transposed
from engine.models.trainable import Trainable


def merged_weights(trainable: Trainable, merged_delta: np.ndarray) -> np.ndarray:
    """Adds `merged_delta` (float32, the layers' products in order) to the adapted layers' weights; as uint8 bytes."""
    parts = []
    for weight, product_OI in zip(_originals(trainable), _products(trainable, merged_delta), strict=True):
        changed = weight.float() + product_OI.to(weight.device)
        parts.append(changed.to(weight.dtype).reshape(-1).view(torch.uint8).cpu())
    return torch.cat(parts).numpy()


def use_weights(trainable: Trainable, merged: torch.Tensor | None) -> None:
    """Points the adapted layers at `merged` (uint8, from `merged_weights`), or at the base's own weights if None."""
    originals, offset = _originals(trainable), 0
    for layer, weight in zip(trainable.adapted_layers(), originals, strict=True):
        if merged is None:
            layer.weight.data = weight
            continue
        layer.weight.data = merged[offset : offset + weight.nbytes].view(weight.dtype).view(weight.shape)
        offset += weight.nbytes


def _originals(trainable: Trainable) -> list[torch.Tensor]:
    """Returns the base's own weights of the adapted layers, which the first call keeps."""
    if not trainable.originals:
        trainable.originals = [layer.weight.data for layer in trainable.adapted_layers()]
    return trainable.originals


def _products(trainable: Trainable, merged_delta: np.ndarray) -> list[torch.Tensor]:
    """Returns the products in the orientation of the layers' weights: transposed for GPT-2's Conv1D."""
    products = trainable.layout.products(borrow(merged_delta))
    layers = trainable.adapted_layers()
    return [p.T if is_transposed(layer) else p for p, layer in zip(products, layers, strict=True)]
