"""The pool of slots at work: handing out chunks of clients, and running again what a dead slot takes with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from engine.aggregation.exact_sum import BLOCK, PartialSum, merge_parts
from engine.config.federation import Federation
from engine.messages.tasks import Unit, Work
from engine.messages.wire import Report, ShardTotals
from engine.scheduling.dispatcher import Done, Later, Pull, Worked, packs
from engine.scheduling.pool import Pool, Reference
from engine.system.atomic import write_folder
from engine.system.failures import LOST, SlotSilent, within
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums, Totals

PART = 64 * BLOCK  # elements of a sum that are handed over at once, so that no store needs to hold all of it


@dataclass(frozen=True)
class Taken:
    """Sums that slots have handed over, their bytes in the store, of which slots, and what became of the others."""

    sums: list[Any]
    nbytes: int
    slots: list[int]
    lost: dict[int, Exception]


class Slots(Pool):
    """The pool at work. Calls per round grow with the slots, not with the clients."""

    def __init__(self, federation: Federation, memory: Path) -> None:
        super().__init__(federation, memory)
        self.residual: Reference | None = None
        self.merged: dict[str, Reference] = {}
        self.later: list[Later] = []  # done beside the next round's training

    def rebase(self, residual: np.ndarray | None) -> None:
        """Adds a `residual` (see ServerState) to the base's weights, once per node; None: back to the first base."""
        self.residual, self.merged = (None if residual is None else ray.put(residual)), {}
        self.deaths = 0
        for slot in list(self.alive):
            try:
                self.answer(self._rebase(self.actors[slot]))
            except LOST as error:
                self.replace(slot, error)

    def _restore(self, slot: int) -> None:
        """Gives a new slot the weights that the others have."""
        self.answer(self._rebase(self.actors[slot]))

    def _rebase(self, actor: Any) -> Reference:
        if self.residual is None:
            return actor.use_weights.remote(None)
        node = self.answer(actor.place.remote()).node_id
        if node not in self.merged:
            merged = actor.merged_weights.remote(self.residual)
            ray.wait([merged], fetch_local=False, timeout=self.patience_s)
            # A slot that died of it, or has not ended it, must not leave a reference to nothing.
            self.answer(actor.place.remote())
            self.merged[node] = merged
        return actor.use_weights.remote(self.merged[node])

    def units(self, work: Work, lanes: int) -> list[Unit]:
        """The clients of a round in packs."""
        return packs(work.clients, work.steps, lanes)

    def train(self, work: Work, wire: Any, lanes: int) -> Worked:
        """One round's local work. A slot that dies takes its sum with it: the packs in it are run again elsewhere."""
        each: dict[int, Reference] = {}

        def call(actor: Any, chunk: list[Unit]) -> Reference:
            if self.federation.strategy.reads == "sum":
                return actor.run.remote(chunk, wire)
            clients = [client for unit in chunk for client in unit]
            # Return values are owned by the driver: they outlive the slot.
            done, *updates = actor.run_each.options(num_returns=1 + len(clients)).remote(chunk, wire)
            each.update(zip(clients, updates, strict=True))
            return done

        reports: dict[int, Report] = {}
        sums, nbytes, busy = list[Any](), 0, [0.0] * self.size
        done: dict[int, Done] = {}
        ended: dict[Unit, None] = {}  # in the order in which they were
        todo, self.deaths, lost_sums = self.units(work, lanes), 0, 0
        while todo:
            pull = Pull(self, todo, work.cost, call, self.later, _given_up, done)
            done, todo = pull.run(), []
            for report in pull.given_up:
                reports[report.client] = report
                each.pop(report.client, None)  # what it leaves is the error of a dead slot
            taken = self._take_sums(list(done))
            sums, nbytes = [*sums, *taken.sums], nbytes + taken.nbytes
            for slot in taken.slots:
                own = done.pop(slot)
                reports |= {report.client: report for report in own.results}
                busy[slot] += sum(report.seconds for report in own.results)
                ended |= dict.fromkeys(own.units)
            for slot, error in taken.lost.items():
                todo += done.pop(slot).units
                lost_sums += 1
                self.deaths = max(self.deaths, lost_sums)  # whatever was done between is lost with them
                self.replace(slot, error)
            if self.faults:  # updates may have lain on a node that is gone
                lost = {client for client, update in each.items() if _is_lost(update)}
                todo += [unit for unit in ended if lost & {*unit} and unit not in todo]
        return Worked([reports[client] for client in sorted(reports)], sums, nbytes, each, busy)

    def _take_sums(self, slots: list[int]) -> Taken:
        """One sum over all these slots, part by part, so that neither store nor driver holds the slots' wide ones.

        All keep theirs until it is whole: where a slot dies of it, they have them still. Where the rule reads updates,
        there is none, and this shows who is still alive.
        """
        if not slots:
            return Taken([], 0, [], {})
        asked, nbytes = slots[0], 0

        def parts() -> Iterator[list[PartialSum]]:
            nonlocal asked, nbytes
            first, coming = 0, [self.actors[slot].part_of_sum.remote(0, PART) for slot in slots]
            while coming:
                got = list[PartialSum]()
                for slot in slots:
                    asked = slot
                    got.append(self.answer(coming.pop(0)))
                first, nbytes = first + PART, nbytes + sum(one.nbytes for one in got)
                if any(first < length for one in got for length in one.lengths.values()):
                    coming = [self.actors[slot].part_of_sum.remote(first, PART) for slot in slots]
                yield got

        try:
            whole = merge_parts(parts())
        except LOST as error:
            return Taken([], nbytes, [], {asked: error})
        for slot in slots:
            self.actors[slot].forget_sum.remote()
        return Taken([whole] if whole else [], nbytes, slots, {})

    def held(self, sums: Sums) -> int:
        """How many coordinates of a masked vector come in a slot's message."""
        return sums.length

    def masked_shards(self, slot: int) -> Any:
        """Nothing of it is elsewhere."""
        return None

    def unmasked(
        self, session: Session, total_L: np.ndarray, removals: Masks, shards: list[Any]
    ) -> Totals | ShardTotals:
        """What the server learns from the unmasked sum of the slots' messages."""
        return session.sums.decode(total_L)

    def map(self, clients: np.ndarray, costs: np.ndarray, call: Callable[[Any, list[int]], Reference]) -> list[Any]:
        """The results of `call(actor, chunk)` for all `clients` (N,), flat; ValueError when too many slots die.

        `costs` (N,) are in any unit of a second or more: the longest work is handed out first.
        """
        self.deaths = 0
        units: list[Unit] = [(client,) for client in clients.tolist()]
        cost = dict(zip(units, costs.tolist(), strict=True)).__getitem__
        pull = Pull(self, units, cost, lambda actor, chunk: call(actor, [client for (client,) in chunk]))
        return [result for own in pull.run().values() for result in own.results]

    def ask(self, call: Callable[[Any], Reference], *, long: bool = False) -> Any:
        """The result of `call(actor)` in the first slot; one that dies is replaced, ValueError when too many do.

        So is one that does not answer for the recipe's deadline, unless the answer may take `long`.
        """
        self.deaths = 0
        while True:
            try:
                return within(None if long else self.timeout_s, call(self.actors[self.alive[0]]))
            except LOST as error:
                self.replace(self.alive[0], error)

    def export(self, folder: Path, sent: Reference, card: str) -> None:
        """Writes the model folder: files come one at a time, from the first slot; one that dies is replaced."""
        self.deaths = 0

        def files() -> Iterator[tuple[str, bytes]]:
            coming = self.actors[self.alive[0]].export.options(num_returns="streaming").remote(sent, card)
            while True:
                if not ray.wait([coming], timeout=self.timeout_s)[0]:
                    raise SlotSilent(f"no answer for {self.timeout_s:g} s")
                try:
                    yield ray.get(next(coming))
                except StopIteration:
                    return

        while True:
            try:
                return write_folder(folder, files())
            except LOST as error:
                self.replace(self.alive[0], error)


def _given_up(client: int, why: str) -> Report:
    return Report.of_nothing(client, (f"its slot died of it: {why}",))


def _is_lost(update: Reference) -> bool:
    try:
        ray.get(update)
        return False
    except LOST:
        return True
