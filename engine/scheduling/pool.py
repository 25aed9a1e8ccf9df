"""Where slots are: placing them, giving each base and rows, and making anew those that die."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.config.federation import Federation
from engine.messages.events import Fault
from engine.messages.tasks import Place
from engine.models.gpu_base import start_holder
from engine.scheduling.placement import asked_or_fitting, slots_that_fit
from engine.system.failures import LOST, last_line, within
from engine.workers.token_columns import Parts, put_tokens
from engine.workers.worker import ClientActor
from strategies.core.layout import Layout
from strategies.core.sharding import Partition

Reference = Any  # ray.ObjectRef, whose calls on an untyped actor handle the checker cannot follow
MAX_DEATHS = 10  # and one for each slot, with nothing done between: beyond, the machine and not chance is at fault
START_TIMEOUT_S = 300.0
LOOK_S = 5.0  # between looks at what the cluster has, while a slot waits for a place


@dataclass(frozen=True)
class Start:
    """What the driver learns from the slots before the first round; of gangs, how vectors are cut."""

    layout: Layout
    initial: np.ndarray | Partition
    tokens: Path
    slots: int
    base_bytes: int
    without_gpu: int


class Pool:
    """All slots of a run; `alive` are the numbers of those that there still are."""

    client: ClassVar[type[ClientActor]] = ClientActor
    may_shrink: ClassVar[bool] = True

    def __init__(self, federation: Federation, memory: Path) -> None:
        self.federation, self.memory, self.timeout_s = federation, memory, federation.clients.timeout_s
        self.patience_s = self.timeout_s  # for what a slot answers at once
        self.start_s = self.timeout_s and max(self.timeout_s, START_TIMEOUT_S)  # for a base or rows that it is given
        self.size = self._count([node["Resources"] for node in ray.nodes() if node["Alive"]])
        self.actors = [self._spawn(slot) for slot in range(self.size)]
        self.alive = list(range(self.size))
        self.faults: list[Fault] = []
        self.nodes: dict[int, str] = {}  # where each slot is
        self.holders: dict[tuple[str, str], Any] = {}
        self.parts: Parts | None = None
        self.deaths = 0

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

        The death of a slot here is raised as it is: nothing has begun, and whoever asked begins again.
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
        self.nodes = {slot: place.node_id for slot, place in enumerate(places)}
        return self._started(store, shared, places)

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
        nbytes, self.packed, self.base = reader.load_base.options(num_returns=3).remote()
        found: int = ray.get(nbytes)
        return found

    def _attach(self, slot: int) -> Reference:
        actor = self.actors[slot]
        tokens = self.answer(actor.find_tokens.remote(self.tokens))
        if tokens is None:
            self.parts = self.parts or put_tokens(self.tokens)
            tokens = within(self.start_s, actor.receive_tokens.remote(self.tokens, self.parts))
        place = self.answer(actor.place.remote())
        shares = place.gpu is not None and self.federation.clients.num_gpus < 1
        base = self._held(place.node_id, str(place.gpu)) if shares else self.base
        return actor.attach.remote(self.packed, base, tokens, slot == 0)

    def _held(self, node_id: str, gpu: str) -> Any:
        """Where the base lies on a GPU that slots share; who holds it there is made anew if need be."""
        key = node_id, gpu
        if key in self.holders:
            try:
                return self.answer(self.holders[key].handle.remote())
            except LOST:
                pass
        self.holders[key] = start_holder(node_id, gpu, self.base)
        return within(self.start_s, self.holders[key].handle.remote())

    def refuse_lost_memory(self) -> None:
        """Raises ValueError if clients remember in a folder that not every slot's node sees."""
        ray.get([actor.refuse_lost_memory.remote() for actor in self.actors])

    def _restore(self, slot: int) -> None:
        """Gives a new slot what the others have been given since the start."""

    def replace(self, slot: int, error: Exception) -> None:
        """Puts a new slot into the place of one that `error` tells the death of.

        Where the cluster has no place for it any more, the others go on without it. ValueError when too many have died
        of something else than their node's end, and nothing was done between.
        """
        while True:
            self.deaths += not self.lost_with_node(slot)
            self.nodes.pop(slot, None)
            self.faults.append(Fault("slot", str(slot), last_line(error)))
            if self.deaths > MAX_DEATHS + self.size:
                raise ValueError(
                    f"{self.deaths} slots died one after another, the last so: {last_line(error)}; "
                    f"if memory ran out, lower clients.slots, train.batch or train.max_length"
                ) from error
            self._end(slot)
            self.actors[slot] = self._spawn(slot)
            try:
                if not self._placed(slot):
                    self._end(slot)
                    self.alive.remove(slot)
                    self.faults.append(Fault("slot", str(slot), "the cluster has no place for another in its stead"))
                    return
                within(self.start_s, self._attach(slot))
                self.answer(self.actors[slot].refuse_lost_memory.remote())
                self._restore(slot)
                return
            except LOST as again:
                error = again

    def lost_with_node(self, slot: int) -> bool:
        """Whether the node that a slot was placed on is gone."""
        return self.nodes.get(slot) in [node["NodeID"] for node in ray.nodes() if not node["Alive"]]

    def _end(self, slot: int) -> None:
        """Ends what is left of a slot: it may be silent, and not dead."""
        ray.kill(self.actors[slot])

    def _placed(self, slot: int) -> bool:
        """Waits for a new slot's place; False where the others can go on without it, ValueError where nobody can."""
        place = self.actors[slot].place.remote()
        deadline, may_shrink = time.monotonic() + START_TIMEOUT_S, self.may_shrink and len(self.alive) > 1
        while not ray.wait([place], timeout=0 if may_shrink and not self._fits() else LOOK_S)[0]:
            late = time.monotonic() > deadline
            if may_shrink and (late or not self._fits()):
                return False
            if late:
                raise ValueError(
                    f"a slot died, and for {START_TIMEOUT_S:g} s there was no place for another: the cluster has less "
                    f"than it had; go on with --resume when it is back"
                )
        self.nodes[slot] = ray.get(place).node_id
        return True

    def _fits(self) -> bool:
        """Whether the nodes that there are could hold all slots."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        try:
            return slots_that_fit(self.federation.clients, nodes) >= len(self.alive)
        except ValueError:
            return False

    def answer(self, given: Any) -> Any:
        """What slots answer that have nothing else to do; SlotSilent where the recipe's deadline is over."""
        return within(self.patience_s, given)

    def stop(self) -> None:
        """Ends all actors of the pool."""
        for actor in [*self.actors, *self.holders.values()]:
            ray.kill(actor)
