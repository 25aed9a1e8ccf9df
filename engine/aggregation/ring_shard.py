"""Where a rank's coordinates lie in a session's ring vector: encoded, masked and unmasked there, never with the rest.

A whole vector is the only shard of its partition. Every shard begins with the ring vector's head (how many clients, and
their weight), of which the first rank's counts; the clients' figures are in the first rank's shard too.
Legend: H coordinates of the head, S of the shard, head included.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
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
class Piece:
    """Coordinates `first` to `last` (excluded) of one sum of the ring vector."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class RingShard:
    """The coordinates of a session's ring vector that are a rank's; without a `partition` all are the only rank's.

    `live` are the strategy's masks (P,) of whole vectors: the ring leaves frozen coordinates out.
    """

    sums: Sums
    live: Mapping[str, Mask]
    partition: Partition | None = None
    rank: int = 0

    @cached_property
    def live_S(self) -> Mapping[str, Mask]:
        """The masks of this shard of the vectors."""
        if self.partition is None:
            return self.live
        return {name: self.partition.cut(mask, self.rank) for name, mask in self.live.items()}

    @cached_property
    def pieces(self) -> list[Piece]:
        """What the shard consists of after its head, in order."""
        pieces = []
        for entry in self.sums.sums:
            mask, parts = self.live.get(entry.name), [(0, entry.length)] if self.rank == 0 else []
            if not entry.name.startswith(FIGURE) and self.partition is not None:
                partition = self.partition if mask is None else self.partition.of(mask)
                parts = list(partition.parts[self.rank])
            pieces += [Piece(entry.name, first, last) for first, last in parts]
        return pieces

    @cached_property
    def head(self) -> int:
        """H, the number of the head's coordinates."""
        return len(self.sums.encode_head(0.0))

    @cached_property
    def length(self) -> int:
        """S, the number of coordinates with the head's."""
        return self.head + sum(piece.last - piece.first for piece in self.pieces)

    @cached_property
    def _stretches(self) -> list[tuple[int, int, int]]:
        """Where neighboring coordinates begin and end in the shard, and where they begin in the ring vector."""
        stretches, offset = [(0, self.head, 0)], self.head
        for piece in self.pieces:
            length, position = piece.last - piece.first, self.sums.starts[piece.name] + piece.first
            start, end, first = stretches[-1]
            if first + end - start == position:
                stretches[-1] = (start, end + length, first)
            else:
                stretches.append((offset, offset + length, position))
            offset += length
        return stretches

    def views(self, values: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """Yields each piece with its view into what follows the head (S - H,)."""
        offset = 0
        for piece in self.pieces:
            yield piece, values[offset : offset + piece.last - piece.first]
            offset += piece.last - piece.first

    def encode_into(
        self, total_S: np.ndarray, values: Mapping[str, np.ndarray], weight: float, draws: np.random.Generator
    ) -> None:
        """Adds a client's values, by sum, to a shard's total; rounding is that of the whole vector.

        Raises ValueError, and changes nothing, where the lengths are not those of the sums.
        """
        lengths = Counter(dict.fromkeys(values, 0))
        for piece in self.pieces:
            lengths[piece.name] += piece.last - piece.first
        given = {name: len(vector) for name, vector in values.items()}
        if given != lengths:
            raise ValueError(f"the sums have {dict(lengths)} coordinates here, and were given {given}")
        total_S[: self.head] += self.sums.encode_head(weight)
        used: Counter[str] = Counter()
        for piece, total in self.views(total_S[self.head :]):
            part = values[piece.name][used[piece.name] :][: len(total)]
            used[piece.name] += len(total)
            total += self.sums.encode_part(piece.name, part, weight, draws, piece.first)

    def mask(self, values_S: np.ndarray, masks: Masks) -> None:
        """Applies masks in place."""
        for start, end, position in self._stretches:
            masks.apply(values_S[start:end], position)

    def unmasked(
        self, masked: list[np.ndarray], removals: Masks, count: int, weight: float
    ) -> tuple[dict[str, float], AggregateShard]:
        """Returns the figures in this shard, and the shard of the sums, from all slots' masked shards without heads.

        This is the server's part, of `count` clients with the given sum of weights.
        """
        total_S = np.zeros(self.length, np.uint32)
        for values in masked:
            total_S[self.head :] += values
        self.mask(total_S, removals)
        figures: dict[str, float] = {}
        parts: dict[str, list[np.ndarray]] = {}
        for piece, total in self.views(total_S[self.head :]):
            values = self.sums.decode_part(piece.name, total)
            if piece.name.startswith(FIGURE):
                figures[piece.name.removeprefix(FIGURE)] = float(values[0])
            else:
                parts.setdefault(piece.name, []).append(values.astype(np.float32))
        vectors = {name: torch.from_numpy(np.concatenate(vectors)) for name, vectors in parts.items()}
        whole = {name: vector.numpy() for name, vector in with_frozen(vectors, self.live_S).items()}
        return figures, AggregateShard(weight, whole.pop("delta"), whole, count)
