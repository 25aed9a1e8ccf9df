"""A rank's shard of a ring vector: encoded, added up, masked and unmasked at its own place, never with the rest.

The head (how many clients, and their weight) is the first rank's part and travels by itself; the clients' figures are
in the first rank's shard. Legend: S ring coordinates of the shard.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.aggregation.ring_encoding import FIGURES
from engine.config.federation import Federation
from engine.messages.wire import WireAggregate
from strategies.core.live import with_frozen, without_frozen
from strategies.core.protocol import Mask, Update
from strategies.core.seeds import rng
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks, wrap
from strategies.secagg.ring import Sums


@dataclass(frozen=True)
class RingShard:
    """Which coordinates of a session's ring vector are a rank's, and what of its clients they sum to.

    `live` are the strategy's masks (P,) of the whole vectors, which the ring has without their frozen coordinates.
    """

    sums: Sums
    partition: Partition
    rank: int
    live: Mapping[str, Mask]
    pieces: tuple[tuple[str, int, int], ...] = field(init=False, repr=False)
    live_S: dict[str, Mask] = field(init=False, repr=False)
    total_S: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pieces = tuple(self._pieces())
        length = sum(last - first for _, first, last in pieces)
        object.__setattr__(self, "pieces", pieces)
        live_S = {name: self.partition.cut(mask, self.rank) for name, mask in self.live.items()}
        object.__setattr__(self, "live_S", live_S)
        object.__setattr__(self, "total_S", np.zeros(length, np.uint32))

    def _pieces(self) -> Iterator[tuple[str, int, int]]:
        """Each sum's intervals that are this rank's, within the sum."""
        for entry in self.sums.sums:
            if entry.name not in FIGURES:
                mask = self.live.get(entry.name)
                partition = self.partition if mask is None else self.partition.of(mask)
                yield from ((entry.name, first, last) for first, last in partition.parts[self.rank])
            elif self.rank == 0:
                yield entry.name, 0, entry.length

    def _places(self, values_S: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
        """Each piece's sum and first coordinate in it, and its view into a vector of the shard."""
        offset = 0
        for name, first, last in self.pieces:
            yield name, first, values_S[offset : offset + last - first]
            offset += last - first

    def add(self, update: Update, figures: Mapping[str, float], federation: Federation, round_: int) -> None:
        """Adds a client's shard of its update, and its figures; rounding is that of the whole vector."""
        values = without_frozen({"delta": update.delta, **update.extras}, self.live_S)
        flat = {name: vector.numpy() for name, vector in values.items()}
        flat |= {name: np.array([figure]) for name, figure in figures.items()}
        draws, taken = rng(federation.seed, round_, update.client, "rounding"), dict.fromkeys(flat, 0)
        for name, first, total in self._places(self.total_S):
            own = flat[name][taken[name] : taken[name] + len(total)]
            taken[name] += len(total)
            total += self.sums.encode_part(name, own, update.weight, draws, first)

    def beyond(self, update: Update) -> int:
        """How many coordinates of the update a sum's bound cuts."""
        limits = {entry.name: entry.bound for entry in self.sums.sums}
        values = {"delta": update.delta, **update.extras}
        return sum(int((value.abs() > limits[name]).sum()) for name, value in values.items())

    def masked(self, masks: list[Masks]) -> np.ndarray:
        """The sum (S,) under all these masks."""
        masked_S = self.total_S.copy()
        wrap(masked_S, self.sums.bits)
        for mask in masks:
            self._apply(mask, masked_S)
        return masked_S

    def unmasked(
        self, masked: list[np.ndarray], removals: Masks, count: int, weight: float
    ) -> tuple[dict[str, float], WireAggregate]:
        """The server's part: the figures that are in this shard, and the shard of the sums, of all slots' vectors."""
        total_S = masked[0].copy()  # what comes out of the object store is read-only
        for other_S in masked[1:]:
            total_S += other_S
        self._apply(removals, total_S)
        figures: dict[str, float] = {}
        found: dict[str, list[np.ndarray]] = {}
        for name, _, piece in self._places(total_S):
            values = self.sums.decode_part(name, piece)
            if name in FIGURES:
                figures[name] = float(values[0])
            else:
                found.setdefault(name, []).append(values.astype(np.float32))
        vectors = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}
        whole = {name: vector.numpy() for name, vector in with_frozen(vectors, self.live_S).items()}
        return figures, WireAggregate(weight, whole.pop("delta"), whole, count)

    def _apply(self, masks: Masks, values_S: np.ndarray) -> None:
        for name, first, piece in self._places(values_S):
            masks.apply(piece, self.sums.starts[name] + first)
