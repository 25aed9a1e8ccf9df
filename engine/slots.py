"""The pool of slots: placing them, handing out chunks of clients, and running again what a dead slot takes with it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.atomic import write_folder
from engine.client import ClientActor, Place
from engine.fitting import asked_or_fitting, slots_that_fit
from engine.holder import start_holder
from engine.lost import LOST
from engine.pulling import Later, Unit, Work, Worked, packs, pull
from engine.rows import Parts, put_tokens
from engine.settings import Federation
from engine.wire import Report, ShardTotals
from strategies.layout import Layout
from strategies.partition import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.ring import Sums, Totals

Reference = Any  # ray.ObjectRef, whose calls on an untyped actor handle the checker cannot follow
MAX_DEATHS = 5  # within one round or evaluation: beyond, the machine and not chance is at fault
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Start:
    """What the driver learns from the slots before the first round; of gangs, how vectors are cut."""

    layout: Layout
    initial: np.ndarray | Partition
    tokens: Path
    slots: int
    base_bytes: int
    without_gpu: int


class Slots:
    """All slots of a run. Calls per round grow with the slots, not with the clients."""

    client: ClassVar[type[ClientActor]] = ClientActor

    def __init__(self, federation: Federation, memory: Path) -> None:
        self.federation, self.memory = federation, memory
        self.size = self._count([node["Resources"] for node in ray.nodes() if node["Alive"]])
        self.actors = [self._spawn(slot) for slot in range(self.size)]
        self.holders: dict[tuple[str, str], Any] = {}
        self.parts: Parts | None = None
        self.residual: Reference | None = None
        self.merged: dict[str, Reference] = {}
        self.deaths = 0
        self.later: list[Later] = []  # done beside the next round's training

    def _count(self, nodes: list[dict[str, float]]) -> int:
        """How many slots there are to be."""
        return asked_or_fitting(self.federation.clients, slots_that_fit(self.federation.clients, nodes))

    def kind_of(self, slot: int) -> int:
        """Which kind of clients a slot takes; here there is one kind."""
        return 0

    def kinds(self, clients: np.ndarray) -> np.ndarray:
        """The kinds of `clients` (N,), by which they find a slot."""
        return np.zeros(len(clients), np.int64)

    def _here(self) -> list[int]:
        """The slots that can read the base into the store."""
        return list(range(self.size))

    def _spawn(self, slot: int) -> Any:
        clients = self.federation.clients
        actor = ray.remote(self.client).options(num_cpus=clients.num_cpus, num_gpus=clients.num_gpus)
        return actor.remote(self.federation, self.memory)

    def _reader(self, places: list[Place]) -> Any:
        """A slot on the driver's node, where store and base lie; if there is none, an actor that takes no resources."""
        here = ray.get_runtime_context().get_node_id()
        for slot in self._here():
            if places[slot].node_id == here:
                return self.actors[slot]
        pinned = NodeAffinitySchedulingStrategy(here, soft=False)
        options = ray.remote(self.client).options(num_cpus=0, num_gpus=0, scheduling_strategy=pinned)
        return options.remote(self.federation, self.memory)

    def start(self, store: Path, shared: str | None = None) -> Start:
        """Reads base and rows beside the driver, then attaches all slots; ValueError if they cannot be had.

        `shared` is the location that the store was copied from, if it was: its token columns lie there too.
        """
        clients = self.federation.clients
        try:
            places = ray.get([actor.place.remote() for actor in self.actors], timeout=START_TIMEOUT_S)
        except GetTimeoutError:
            raise ValueError(
                f"{self.size} slots of {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs "
                f"could not be placed within {START_TIMEOUT_S:g} s; Ray has {ray.available_resources()} free: "
                f"wait for other work to end, or lower clients.slots"
            ) from None
        try:
            return self._started(store, shared, places)
        except LOST as error:
            raise ValueError(
                f"a slot died while it read the base or the rows ({_last_line(error)}); "
                f"if memory ran out, lower clients.slots, or take a smaller base"
            ) from error

    def _started(self, store: Path, shared: str | None, places: list[Place]) -> Start:
        reader = self._reader(places)
        base_bytes = self._read_base(reader)  # first, since a base that is none has no tokenizer either
        self.tokens = Path(ray.get(reader.tokenize.remote(store, shared)))
        if not any(reader is actor for actor in self.actors):
            ray.kill(reader)  # what it has read stays in the store, owned by the driver
        layout, initial = ray.get([self._attach(slot) for slot in range(self.size)])[0]
        without_gpu = sum(place.gpu is None for place in places) if self.federation.clients.num_gpus else 0
        return Start(layout, initial, self.tokens, self.size, base_bytes, without_gpu)

    def _read_base(self, reader: Any) -> int:
        """Lets the base be read into the store; returns its bytes."""
        self.packed, self.base = reader.load_base.options(num_returns=2).remote()
        nbytes: int = ray.get(self.packed).nbytes
        return nbytes

    def _attach(self, slot: int) -> Reference:
        actor = self.actors[slot]
        tokens = ray.get(actor.find_tokens.remote(self.tokens))
        if tokens is None:
            self.parts = self.parts or put_tokens(self.tokens)
            tokens = ray.get(actor.receive_tokens.remote(self.tokens, self.parts))
        place = ray.get(actor.place.remote())
        if place.gpu is None:
            return actor.attach.remote(self.packed, self.base, tokens, slot == 0)
        key = (place.node_id, place.gpu)
        if key not in self.holders:
            self.holders[key] = start_holder(*key, self.base)
        return actor.attach.remote(self.packed, self.holders[key].handle.remote(), tokens, slot == 0)

    def refuse_lost_memory(self) -> None:
        """Raises ValueError if clients remember in a folder that not every slot's node sees."""
        ray.get([actor.refuse_lost_memory.remote() for actor in self.actors])

    def rebase(self, residual: np.ndarray | None) -> None:
        """Adds a `residual` (see ServerState) to the base's weights, once per node; None: back to the first base."""
        self.residual, self.merged = (None if residual is None else ray.put(residual)), {}
        self.deaths = 0
        for slot, actor in enumerate(self.actors):
            try:
                ray.get(self._rebase(actor))
            except LOST as error:
                self.replace(slot, error)

    def _restore(self, slot: int) -> None:
        """Gives a new slot the weights that the others have."""
        ray.get(self._rebase(self.actors[slot]))

    def _rebase(self, actor: Any) -> Reference:
        if self.residual is None:
            return actor.use_weights.remote(None)
        node = ray.get(actor.place.remote()).node_id
        if node not in self.merged:
            merged = actor.merged_weights.remote(self.residual)
            ray.wait([merged], fetch_local=False)
            ray.get(actor.place.remote())  # a slot that died of it must not leave a reference to nothing
            self.merged[node] = merged
        return actor.use_weights.remote(self.merged[node])

    def units(self, work: Work, lanes: int) -> list[Unit]:
        """The clients of a round in packs."""
        return packs(work.clients, work.steps, lanes)

    def train(self, work: Work, wire: Reference, lanes: int) -> Worked:
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
        sums: list[Any] = []
        busy = [0.0] * self.size
        todo, self.deaths = self.units(work, lanes), 0
        home = {client: unit for unit in todo for client in unit}
        while todo:
            done = pull(self, todo, [work.cost(unit) for unit in todo], call, self.later)
            lost: dict[Unit, None] = {}
            closing = {slot: self._close(slot) for slot in done}
            for slot, results in done.items():
                try:
                    sums.append(self._closed(closing[slot]))
                    reports |= {report.client: report for report in results}
                    busy[slot] += sum(report.seconds for report in results)
                except LOST as error:
                    lost |= dict.fromkeys(home[report.client] for report in results)
                    self.replace(slot, error)
            todo = list(lost)
        return Worked([reports[client] for client in sorted(reports)], sums, each, busy)

    def _close(self, slot: int) -> Any:
        return self.actors[slot].close_round.remote()

    def _closed(self, closing: Any) -> Any:
        return ray.get(closing)

    def held(self, sums: Sums) -> int:
        """How many coordinates of a masked vector come in a slot's message."""
        return sums.length

    def masked_shards(self, slot: int) -> Any:
        """Nothing of it is elsewhere."""
        return None

    def unmasked(self, sums: Sums, total_L: np.ndarray, removals: Masks, shards: list[Any]) -> Totals | ShardTotals:
        """What the server learns from the unmasked sum of the slots' messages."""
        return sums.decode(total_L)

    def map(self, clients: np.ndarray, costs: np.ndarray, call: Callable[[Any, list[int]], Reference]) -> list[Any]:
        """The results of `call(actor, chunk)` for all `clients` (N,), flat; ValueError when too many slots die.

        `costs` (N,) are in any unit: the longest work is handed out first.
        """
        self.deaths = 0
        units: list[Unit] = [(client,) for client in clients.tolist()]
        done = pull(self, units, costs.tolist(), lambda actor, chunk: call(actor, [client for (client,) in chunk]))
        return [result for results in done.values() for result in results]

    def ask(self, call: Callable[[Any], Reference]) -> Any:
        """The result of `call(actor)` in the first slot; one that dies is replaced, ValueError when too many do."""
        self.deaths = 0
        while True:
            try:
                return ray.get(call(self.actors[0]))
            except LOST as error:
                self.replace(0, error)

    def export(self, folder: Path, sent: Reference, card: str) -> None:
        """Writes the model folder: files come one at a time, from the first slot; one that dies is replaced."""
        self.deaths = 0

        def files() -> Iterator[tuple[str, bytes]]:
            for file in self.actors[0].export.options(num_returns="streaming").remote(sent, card):
                yield ray.get(file)

        while True:
            try:
                return write_folder(folder, files())
            except LOST as error:
                self.replace(0, error)

    def replace(self, slot: int, error: Exception) -> None:
        """Puts a new slot into the place of one that `error` tells the death of; ValueError when too many have died."""
        while True:
            self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise ValueError(
                    f"{self.deaths} slots died of the same work, the last so: {_last_line(error)}; "
                    f"if memory ran out, lower clients.slots, train.batch or train.max_length"
                ) from error
            self.actors[slot] = self._spawn(slot)
            try:
                ray.get(self.actors[slot].place.remote(), timeout=START_TIMEOUT_S)
                ray.get(self._attach(slot))
                ray.get(self.actors[slot].refuse_lost_memory.remote())
                self._restore(slot)
                return
            except GetTimeoutError:
                raise ValueError(
                    f"a slot died, and for {START_TIMEOUT_S:g} s there was no place for another: the cluster has less "
                    f"than it had; go on with --resume when it is back"
                ) from None
            except LOST as again:
                error = again

    def stop(self) -> None:
        """Ends all actors of the pool."""
        for actor in [*self.actors, *self.holders.values()]:
            ray.kill(actor)


def _last_line(error: Exception) -> str:
    """What Ray says of a death, without its colours and its stack."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return next((line.strip() for line in reversed(plain) if line.strip()), type(error).__name__)
