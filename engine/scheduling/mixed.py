"""The pool of a federation of unequal clients: gangs for those with many rows, plain slots for the others."""

from pathlib import Path
from typing import Any

import numpy as np
import ray

from datasets_partition.store.tokens import Tokens
from engine.messages.tasks import Place, Unit, Work
from engine.scheduling.gangs import Gangs
from engine.scheduling.placement import slots_that_fit
from engine.scheduling.pool import Reference, Start
from engine.scheduling.slots import Slots


class Mixed(Gangs):
    """The first slots are the gangs. Plain slots cut their sums as gangs do, and hold the base as plain slots do."""

    def _count(self, nodes: list[dict[str, float]]) -> int:
        clients, taken = self.federation.clients, self.zero.gangs * self.zero.ranks
        plain = slots_that_fit(clients, nodes) - taken
        if plain < 1:
            raise ValueError(
                f"{self.zero.gangs} gangs of {self.zero.ranks} ranks and one plain slot need {taken + 1} times "
                f"{clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs, and there is room for {taken + plain} of "
                f"them: lower clients.zero.gangs or clients.zero.ranks"
            )
        return self.zero.gangs + (plain if clients.slots == "auto" else min(clients.slots, plain))

    def _plain(self, slot: int) -> bool:
        return slot >= self.zero.gangs

    def kind_of(self, slot: int) -> int:
        """0 for a gang, 1 for a plain slot."""
        return int(self._plain(slot))

    def kinds(self, clients: np.ndarray) -> np.ndarray:
        """0 for clients of many rows, 1 for the others."""
        found: np.ndarray = (self.rows[clients] < self.zero.from_rows).astype(np.int64)
        return found

    def units(self, work: Work, lanes: int) -> list[Unit]:
        """Packs of the clients of plain slots; a gang takes one at a time."""
        few = self.kinds(work.clients) == 1
        return super().units(work.of(~few), 1) + super().units(work.of(few), lanes)

    def _spawn(self, slot: int) -> Any:
        return Slots._spawn(self, slot) if self._plain(slot) else super()._spawn(slot)

    def _reader(self, places: list[Place]) -> Any:
        return Slots._reader(self, places)

    def _read_base(self, reader: Any) -> int:
        return Slots._read_base(self, reader)

    def _here(self) -> list[int]:
        """The slots that can read the base into the store: the plain ones."""
        return [slot for slot in range(self.size) if self._plain(slot)]

    def _started(self, store: Path, shared: str | None, places: list[Place]) -> Start:
        start = super()._started(store, shared, places)
        self.rows = Tokens.open(start.tokens).counts("train")
        return start

    def _end(self, slot: int) -> None:
        if self._plain(slot):
            Slots._end(self, slot)

    def _attach(self, slot: int) -> Reference:
        return Slots._attach(self, slot) if self._plain(slot) else super()._attach(slot)

    def _close(self, slot: int) -> list[tuple[Reference, Reference]]:
        if not self._plain(slot):
            return super()._close(slot)
        closed = self.actors[slot].close_in_shards.options(num_returns=1 + self.zero.ranks).remote(self.partition)
        nbytes, *shards = closed
        nothing = ray.put(0)
        return [(nbytes if rank == 0 else nothing, shard) for rank, shard in enumerate(shards)]

    def stop(self) -> None:
        """Ends all slots."""
        super().stop()
        for slot in self._here():
            ray.kill(self.actors[slot])
        for holder in self.holders.values():
            ray.kill(holder)
