"""How slots hand over the sums of a round: part by part where vectors are whole, as references where they are shards.

Legend: L coordinates of a ring vector.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engine.aggregation.exact_sum import BLOCK, PartialSum, merge_parts
from engine.messages.shards import ShardedState, ShardSum, ShardTotals
from engine.messages.tasks import Served
from engine.scheduling.worker_kinds import Reference
from engine.system.failures import LOST
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums, Totals

PART = 64 * BLOCK  # elements of a sum that are handed over at once, so that no store needs to hold all of it


@dataclass(frozen=True)
class Taken:
    """Sums that slots have handed over, their bytes in the store, of which slots, and how the other slots ended."""

    sums: list[Any]
    nbytes: int
    slots: list[int]
    lost: dict[int, Exception]


class Workers(Protocol):
    """What is asked of a pool here."""

    actors: list[Any]

    def answer(self, references: Any) -> Any:
        """Returns what slots answer."""
        ...

    def replace(self, slot: int, error: Exception) -> None:
        """Makes another slot in place of one that has ended."""
        ...

    def ranks(self, slot: int) -> Sequence[Any]:
        """Returns the actors of a slot's processes."""
        ...

    def close(self, slot: int) -> list[tuple[Reference, Reference]]:
        """Returns references to the bytes of each shard of a slot's sum, and to the shard."""
        ...


@dataclass(frozen=True)
class WholeSums:
    """Vectors are whole: the driver adds sums up."""

    pool: Workers

    def take(self, slots: list[int]) -> Taken:
        """Returns one sum over all these slots, taken part by part, so that nobody holds the slots' wide integers.

        All slots keep theirs until it is whole: if a slot dies meanwhile, the others still have them. If the rule reads
        single updates, there is no sum, and this shows who is still alive.
        """
        if not slots:
            return Taken([], 0, [], {})
        actors = self.pool.actors
        asked, nbytes = slots[0], 0

        def parts() -> Iterator[list[PartialSum]]:
            nonlocal asked, nbytes
            first, coming = 0, [actors[slot].part_of_sum.remote(0, PART) for slot in slots]
            while coming:
                part = list[PartialSum]()
                for slot in slots:
                    asked = slot
                    part.append(self.pool.answer(coming.pop(0)))
                first, nbytes = first + PART, nbytes + sum(partial.nbytes for partial in part)
                if any(first < length for partial in part for length in partial.lengths.values()):
                    coming = [actors[slot].part_of_sum.remote(first, PART) for slot in slots]
                yield part

        try:
            whole = merge_parts(parts())
        except LOST as error:
            return Taken([], nbytes, [], {asked: error})
        for slot in slots:
            actors[slot].forget_sum.remote()
        return Taken([whole] if whole else [], nbytes, slots, {})

    def held(self, sums: Sums) -> int:
        """Returns how many coordinates of a masked vector come in a slot's message."""
        return sums.length

    def masked_shards(self, slot: int) -> Any:
        """All of a masked vector is in the message."""
        return None

    def unmasked(self, session: Session, total_L: np.ndarray, removals: Masks, shards: list[Any]) -> Totals:
        """Returns what the server learns from the unmasked sum of the slots' messages."""
        return session.sums.decode(total_L)


@dataclass(frozen=True)
class ShardSums:
    """Vectors are cut by `partition`: state and sums stay in the store, and ranks of the first slot work on them."""

    pool: Workers
    partition: Partition

    def take(self, slots: list[int]) -> Taken:
        """Returns each slot's sum, in shards that stay in the store."""
        closing = {slot: self.pool.close(slot) for slot in slots}
        sums, lost = dict[int, ShardSum](), dict[int, Exception]()
        for slot, shards in closing.items():
            try:
                nbytes = sum(self.pool.answer([nbytes for nbytes, _ in shards]))
                sums[slot] = ShardSum(tuple(shard for _, shard in shards), nbytes)
            except LOST as error:
                lost[slot] = error
        return Taken([*sums.values()], sum(entry.nbytes for entry in sums.values()), [*sums], lost)

    def held(self, sums: Sums) -> int:
        """The head: ranks hold the rest."""
        return len(sums.encode_head(1.0))

    def masked_shards(self, slot: int) -> list[Reference]:
        """Returns references to the ranks' shards of a slot's masked vector, once all of them are there."""
        shards = [rank.masked_shard.options(num_returns=2).remote() for rank in self.pool.ranks(slot)]
        self.pool.answer([there for there, _ in shards])
        return [shard for _, shard in shards]

    def unmasked(self, session: Session, total_L: np.ndarray, removals: Masks, shards: list[Any]) -> ShardTotals:
        """Returns what the server learns: each shard of it in a rank of the first slot, the figures here."""
        totals = session.sums.decode_head(total_L)
        while True:
            unmasked = [
                rank.unmask_shard.options(num_returns=2).remote(session, removals, *totals, *masked)
                for rank, *masked in zip(self.pool.ranks(0), *shards, strict=True)
            ]
            try:
                figures: dict[str, float] = self.pool.answer(unmasked[0][0])
                self.pool.answer([there for there, _ in unmasked[1:]])
                return ShardTotals(*totals, tuple(part for _, part in unmasked), figures)
            except LOST as error:
                self.pool.replace(0, error)

    def initial(self) -> ShardedState:
        """Returns the state before the first round."""
        return self._kept(0, [rank.initial.options(num_returns=2).remote() for rank in self.pool.ranks(0)])

    def serve(self, state: ShardedState, served: Served, sums: list[ShardSum]) -> ShardedState:
        """Returns the next state: each shard in a rank of the first slot, from that shard of all slots' sums."""
        while True:
            shards = [
                rank.serve.options(num_returns=2).remote(part, state.round, served, *parts)
                for rank, part, *parts in zip(
                    self.pool.ranks(0), state.parts, *[entry.parts for entry in sums], strict=True
                )
            ]
            try:
                return self._kept(state.round + 1, shards)
            except LOST as error:
                self.pool.replace(0, error)

    def _kept(self, round_: int, shards: list[tuple[Reference, Reference]]) -> ShardedState:
        """Returns the state of these shards, given as references to bytes and shard, once all of them are there."""
        nbytes = sum(self.pool.answer([nbytes for nbytes, _ in shards]))
        return ShardedState(round_, tuple(part for _, part in shards), nbytes)
