"""Shares the base on a GPU: one actor owns its memory, and the slots on that GPU map it by CUDA IPC."""

from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from engine.messages.shards import borrow


class BaseHolder:
    """Holds a uint8 buffer on the only GPU that is visible to its process."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = borrow(buffer).to("cuda")

    def handle(self) -> tuple[Any, ...]:
        """Returns what another process on this GPU needs to map the buffer; valid while this actor lives."""
        arguments: tuple[Any, ...] = reduce_tensor(self.buffer)[1]
        return arguments


def map_handle(handle: tuple[Any, ...]) -> torch.Tensor:
    """Maps the holder's buffer (uint8) into this process; RuntimeError if the holder has died."""
    buffer: torch.Tensor = rebuild_cuda_tensor(*handle)
    return buffer


def start_holder(node_id: str, gpu: str, buffer: ray.ObjectRef[Any]) -> Any:
    """Starts the holder of GPU `gpu` on a node. It asks Ray for no GPU share: the slots' shares cover it."""
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    actor = ray.remote(BaseHolder).options(
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        runtime_env={"env_vars": environment},
    )
    return actor.remote(buffer)
