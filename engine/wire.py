"""How vectors cross Ray: as flat NumPy arrays, mapped from the store without a copy; torch tensors would be pickled."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from strategies.dp_central import CentralPlan
from strategies.dp_distributed import DistributedPlan
from strategies.dp_example import ExamplePlan
from strategies.layout import Layout
from strategies.types import Broadcast, Update


@dataclass(frozen=True)
class WireBroadcast:
    """A Broadcast as it lies in the object store; clients' memories from before round `oldest` may be forgotten.

    `dp` says how clients bound what they send and what noise they add, `clip` is the round's clipping norm.
    """

    round: int
    params: np.ndarray
    extras: dict[str, np.ndarray]
    oldest: int = 0
    dp: CentralPlan | DistributedPlan | ExamplePlan | None = None
    clip: float = 0.0


@dataclass(frozen=True)
class Report:
    """What became of one client in a round: its metrics, why its update could not be used, or that it came too late."""

    client: int
    metrics: dict[str, float]
    failed: str | None = None
    late: bool = False


@dataclass(frozen=True)
class WireUpdate:
    """An Update as it lies in the object store."""

    client: int
    weight: float
    delta: np.ndarray
    extras: dict[str, np.ndarray]
    metrics: dict[str, float]


def to_wire(got: Broadcast) -> WireBroadcast:
    """The broadcast without torch; shares its memory."""
    extras = {name: extra.numpy() for name, extra in got.extras.items()}
    return WireBroadcast(got.round, got.params.numpy(), extras)


def from_wire(wire: WireBroadcast, layout: Layout, seed: int) -> Broadcast:
    """The broadcast over the store's own memory, which nobody may write."""
    extras = {name: borrow(extra) for name, extra in wire.extras.items()}
    return Broadcast(wire.round, borrow(wire.params), extras, layout=layout, seed=seed)


def update_to_wire(update: Update) -> WireUpdate:
    """The update without torch; shares its memory."""
    extras = {name: extra.numpy() for name, extra in update.extras.items()}
    return WireUpdate(update.client, update.weight, update.delta.numpy(), extras, update.metrics)


def update_from_wire(wire: WireUpdate) -> Update:
    """The update over the store's own memory, which nobody may write."""
    extras = {name: borrow(extra) for name, extra in wire.extras.items()}
    return Update(wire.client, wire.weight, borrow(wire.delta), extras, wire.metrics)


def borrow(array: np.ndarray) -> torch.Tensor:
    """A tensor over a read-only array's memory, for reading alone: torch cannot mark it so, hence its warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
