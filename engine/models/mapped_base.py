"""The base as processes share it, and what a rule has merged into it. Legend: P parameters.

One process of a node makes merged weights, and the slots map them instead of the base's. On a GPU one actor owns the
base's memory, and the slots on that GPU map it by CUDA IPC.
"""

from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from engine.config.sections import Model
from engine.messages.shards import borrow
from engine.models.base_model import PackedBase, map_base
from engine.models.trainable import trainable_of
from engine.system.page_protection import protect, release


class MappedBase:
    """Maps `base`, the store's bytes or a GPU holder's handle, or copies the bytes to the slot's own GPU."""

    def __init__(self, packed: PackedBase, base: Any, model: Model, seed: int, device: torch.device) -> None:
        self.base, self.device = base, device
        self.merged: np.ndarray | None = None
        self.trainable = trainable_of(map_base(packed, mapped_buffer(base, device)), model, seed)

    def use_merged(self, merged: np.ndarray | None) -> None:
        """Lets the model look at other weights (uint8) of the adapted layers; None: at those of the first base."""
        if merged is not None and self.device.type == "cpu":
            protect(merged)
        self.trainable.use_merged(None if merged is None else borrow(merged).to(self.device))
        if self.merged is not None and self.device.type == "cpu":
            release(self.merged)
        self.merged = merged


def mapped_buffer(base: Any, device: torch.device) -> torch.Tensor:
    """Returns the buffer on the device: the store's own pages, protected, a GPU holder's memory, or a copy on a GPU."""
    if device.type == "cpu":
        protect(base)
    # A handle is mapped as long as its holder lives; RuntimeError if it has died.
    return rebuild_cuda_tensor(*base) if isinstance(base, tuple) else borrow(base).to(device)


class BaseHolder:
    """Holds a uint8 buffer on the only GPU that is visible to its process."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = borrow(buffer).to("cuda")

    def handle(self) -> tuple[Any, ...]:
        """Returns what another process on this GPU needs to map the buffer; valid while this actor lives."""
        arguments: tuple[Any, ...] = reduce_tensor(self.buffer)[1]
        return arguments


def start_holder(node_id: str, gpu: str, buffer: ray.ObjectRef[Any]) -> Any:
    """Starts the holder of GPU `gpu` on a node. It asks Ray for no GPU share: the slots' shares cover it."""
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    there, runtime = NodeAffinitySchedulingStrategy(node_id, soft=False), {"env_vars": environment}
    return ray.remote(BaseHolder).options(num_cpus=0, scheduling_strategy=there, runtime_env=runtime).remote(buffer)
