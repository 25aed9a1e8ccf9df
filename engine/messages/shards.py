"""Model states and aggregates as they cross Ray: flat NumPy arrays, which the object store maps without a copy."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from strategies.core.protocol import Aggregate, ServerState, Vector


def borrow(array: np.ndarray) -> torch.Tensor:
    """Returns a tensor over a read-only array's memory. Only read it: torch cannot mark it so, hence its warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def borrow_all(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns tensors over the memory of several arrays, by name: see `borrow`."""
    return {name: borrow(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class Shard:
    """One shard of a model state, whose `vectors` are moments, or of a broadcast, whose `vectors` are extras.

    A whole state may have a `merged_delta`.
    """

    params: np.ndarray
    vectors: dict[str, np.ndarray]
    merged_delta: np.ndarray | None = None

    @classmethod
    def of(cls, params: Vector, vectors: Mapping[str, Vector], merged_delta: Vector | None = None) -> "Shard":
        """Shares the tensors' memory."""
        merged = None if merged_delta is None else merged_delta.numpy()
        return cls(params.numpy(), {name: vector.numpy() for name, vector in vectors.items()}, merged)

    @property
    def nbytes(self) -> int:
        """Its bytes in the object store."""
        return self.params.nbytes + sum(vector.nbytes for vector in self.vectors.values())

    def state(self, round_: int, seed: int, population: int = 0) -> ServerState:
        """Returns the state that it is a shard of, over the store's own memory."""
        merged = None if self.merged_delta is None else borrow(self.merged_delta)
        vectors = borrow_all(self.vectors)
        return ServerState(round_, borrow(self.params), vectors, merged, seed=seed, population=population)


@dataclass(frozen=True)
class AggregateShard:
    """One shard of an Aggregate, from sums that secure aggregation has unmasked."""

    weight: float
    total: np.ndarray
    extras: dict[str, np.ndarray]
    count: int

    def aggregate(self) -> Aggregate:
        """Returns the aggregate over the store's own memory."""
        return Aggregate(self.weight, borrow(self.total), borrow_all(self.extras), self.count)


@dataclass(frozen=True)
class ShardedState:
    """The server's state after `round` in shards: each a Shard or a reference, of `nbytes` in the object store."""

    round: int
    shards: tuple[Any, ...]
    nbytes: int = 0
