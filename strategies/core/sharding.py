"""The partition of flat vectors (P,) into shards (S,), one for each rank of a gang, the same in all gangs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from strategies.core.layout import Layout


@dataclass(frozen=True)
class Partition:
    """Each rank's intervals (start, end) of the flat vector; its shard (S,) is their content, one after another."""

    intervals: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def contiguous(cls, size: int, ranks: int, unit: int = 1) -> "Partition":
        """One slice per rank, all but the last of the same multiple of `unit` (ZeRO stages 1 and 2)."""
        length = -(-size // (ranks * unit)) * unit
        edges = [min(rank * length, size) for rank in range(ranks + 1)]
        return cls(tuple(((first, last),) for first, last in pairwise(edges)))

    @classmethod
    def by_tensor(cls, layout: Layout, ranks: int) -> "Partition":
        """Each tensor is cut by itself, as `contiguous` cuts a vector (ZeRO stage 3)."""
        by_rank: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        for _, _, start, end in layout.places():
            for of_rank, ((first, last),) in zip(by_rank, cls.contiguous(end - start, ranks).intervals, strict=True):
                of_rank.append((start + first, start + last))
        return cls(tuple(map(tuple, by_rank)))

    def of(self, mask: torch.Tensor) -> "Partition":
        """The partition of the vector that holds only the elements of a mask (P,), one after another."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), mask.cumsum(0)])
        return Partition(tuple(tuple((int(before[i]), int(before[j])) for i, j in cuts) for cuts in self.intervals))

    def length(self, rank: int) -> int:
        """S, the number of elements of a rank's shard."""
        return sum(last - first for first, last in self.intervals[rank])

    def cut(self, flat: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's shard (S,) of a vector (P,)."""
        return torch.cat([flat[first:last] for first, last in self.intervals[rank]])

    def read(self, shards: Sequence[torch.Tensor], first: int, last: int) -> torch.Tensor:
        """The elements from `first` to `last` (excluded) of the vector (P,), from all ranks' shards."""
        stretch = torch.empty(last - first, dtype=shards[0].dtype)
        for rank, shard_S in enumerate(shards):
            offset = 0
            for start, end in self.intervals[rank]:
                low, high = max(start, first), min(end, last)
                if low < high:
                    stretch[low - first : high - first] = shard_S[offset + low - start : offset + high - start]
                offset += end - start
        return stretch

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The vector (P,) from all ranks' shards."""
        return self.read(shards, 0, sum(map(len, shards)))
