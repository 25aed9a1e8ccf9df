"""The base that a slot maps from its neighbors' memory, and what a rule has merged into it. Legend: P parameters."""

from typing import Any

import numpy as np
import torch

from engine.config.sections import Model
from engine.messages.shards import borrow
from engine.models.base_model import PackedBase, map_base
from engine.models.gpu_base import map_handle
from engine.models.merged_base import merged_weights, use_weights
from engine.models.trainable import Trainable
from engine.system.page_protection import look_away, protect, release


class MappedBase:
    """Maps `base`: the store's bytes, or a GPU holder's handle. A GPU of the slot's own gets a copy of the bytes.

    It holds references to what it maps: the store must not reuse pages that this process may not write.
    """

    def __init__(self, packed: PackedBase, base: Any, model: Model, seed: int, device: torch.device) -> None:
        self.base, self.device = base, device
        self.merged: np.ndarray | None = None
        if device.type == "cpu":
            protect(base)
        buffer = map_handle(base) if isinstance(base, tuple) else borrow(base).to(device)
        self.trainable = Trainable(map_base(packed, buffer), model, seed)

    def take_initial(self) -> np.ndarray:
        """Returns the initial vector (P,) and keeps none of it."""
        initial: np.ndarray = self.trainable.initial.numpy()
        del self.trainable.initial
        return initial

    def let_go(self) -> None:
        """Frees this process's pages of a base whose weights have all been copied, since all are trained."""
        if self.device.type == "cpu":
            look_away(self.base)

    def weights_with(self, merged_delta: np.ndarray) -> np.ndarray:
        """Returns the adapted layers' weights with the products of `merged_delta` (float32) in them (uint8)."""
        return merged_weights(self.trainable, merged_delta)

    def use(self, merged: np.ndarray | None) -> None:
        """Lets the model look at other weights (uint8) of the adapted layers; None: at those of the first base."""
        if merged is not None and self.device.type == "cpu":
            protect(merged)
        use_weights(self.trainable, None if merged is None else borrow(merged).to(self.device))
        if self.merged is not None and self.device.type == "cpu":
            release(self.merged)
        self.merged = merged
