"""A rank's shard of a session's ring vector, which is encoded, masked and unmasked by itself.

Every shard begins with the ring vector's head (the number of clients and their weight), of which the first rank's
counts; the clients' figures are in the first rank's shard too. Legend: H coordinates of the head, S of the shard.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from engine.aggregation.ring_encoding import FIGURE
from engine.messages.shards import AggregateShard
from strategies.core.protocol import Mask, with_frozen
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.ring import Sums


@dataclass(frozen=True)
class RingShard:
    """The coordinates of the ring vector that are a rank's; without a `partition` all belong to the only rank."""

    sums: Sums
    sent_masks: Mapping[str, Mask]  # (P,), of whole vectors: the ring leaves frozen coordinates out
    partition: Partition | None = None
    rank: int = 0

    @cached_property
    def sent_masks_S(self) -> Mapping[str, Mask]:
        """The masks of this shard of the vectors."""
        if self.partition is None:
            return self.sent_masks
        return {name: self.partition.cut(mask, self.rank) for name, mask in self.sent_masks.items()}

    @cached_property
    def head(self) -> int:
        """H, the number of the head's coordinates."""
        return len(self.sums.encode_head(0.0))

    @cached_property
    def pieces(self) -> list[tuple[str, int, slice]]:
        """What follows the head, in order: a sum's name, the first coordinate in it, and the place in the shard."""
        pieces, start = [], self.head
        for entry in self.sums.sums:
            mask, intervals = self.sent_masks.get(entry.name), [(0, entry.length)] if self.rank == 0 else []
            if not entry.name.startswith(FIGURE) and self.partition is not None:
                partition = self.partition if mask is None else self.partition.of(mask)
                intervals = list(partition.intervals[self.rank])
            for first, last in intervals:
                pieces.append((entry.name, first, slice(start, start + last - first)))
                start += last - first
        return pieces

    @cached_property
    def length(self) -> int:
        """S, the number of coordinates with the head's."""
        return max((place.stop for *_, place in self.pieces), default=self.head)

    @cached_property
    def _stretches(self) -> list[tuple[int, int, int]]:
        """Where neighboring coordinates begin and end in the shard, and where they begin in the ring vector."""
        stretches = [(0, self.head, 0)]
        for name, first, place in self.pieces:
            (start, end, at), position = stretches[-1], self.sums.starts[name] + first
            if at + end - start == position:
                stretches[-1] = (start, place.stop, at)
            else:
                stretches.append((place.start, place.stop, position))
        return stretches

    def encode_into(
        self, total_S: np.ndarray, values: Mapping[str, np.ndarray], weight: float, draws: np.random.Generator
    ) -> None:
        """Adds a client's values, rounded as in the whole vector; ValueError, and no change, for wrong lengths."""
        lengths, given = Counter[str](), Counter({name: len(vector) for name, vector in values.items()})
        for name, _, place in self.pieces:
            lengths[name] += place.stop - place.start
        if given != lengths:
            raise ValueError(f"the sums have {dict(lengths)} coordinates here, and were given {dict(given)}")
        total_S[: self.head] += self.sums.encode_head(weight)
        rest = {**values}
        for name, first, place in self.pieces:
            piece, rest[name] = np.split(rest[name], [place.stop - place.start])
            total_S[place] += self.sums.encode_piece(name, piece, weight, draws, first)

    def mask(self, values_S: np.ndarray, masks: Masks) -> None:
        """Applies masks in place."""
        for start, end, position in self._stretches:
            masks.apply(values_S[start:end], position)

    def unmasked(
        self, masked: list[np.ndarray], removals: Masks, count: int, weight: float
    ) -> tuple[dict[str, float], AggregateShard]:
        """Returns this shard's figures and sums, from all slots' masked shards without heads, of `count` clients."""
        total_S = np.zeros(self.length, np.uint32)
        for values in masked:
            total_S[self.head :] += values
        self.mask(total_S, removals)
        figures, pieces = dict[str, float](), dict[str, list[np.ndarray]]()
        for name, _, place in self.pieces:
            values = self.sums.decode_piece(name, total_S[place])
            if name.startswith(FIGURE):
                figures[name.removeprefix(FIGURE)] = float(values[0])
            else:
                pieces.setdefault(name, []).append(values.astype(np.float32))
        vectors = {name: torch.from_numpy(np.concatenate(vectors)) for name, vectors in pieces.items()}
        arrays = {name: vector.numpy() for name, vector in with_frozen(vectors, self.sent_masks_S).items()}
        return figures, AggregateShard(weight, arrays.pop("delta"), arrays, count)
