"""The pool of slots: placing them, handing out chunks of clients, and running again what a dead slot takes with it."""

import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.client import ClientActor, Place
from engine.holder import start_holder
from engine.rows import Parts, put_tokens
from engine.settings import Clients, Federation
from engine.sums import PartialSum
from engine.wire import Report
from strategies.layout import Layout

Reference = Any  # ray.ObjectRef, whose calls on an untyped actor handle the checker cannot follow
LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
MAX_DEATHS = 5  # within one round or evaluation: beyond, the machine and not chance is at fault
START_TIMEOUT_S = 300.0
CHUNKS_PER_SLOT = 3


@dataclass(frozen=True)
class Start:
    """What the driver learns from the slots before the first round."""

    layout: Layout
    initial: np.ndarray
    tokens: Path
    slots: int
    base_bytes: int
    without_gpu: int


def slots_that_fit(clients: Clients, nodes: list[dict[str, float]]) -> int:
    """How many slots the nodes' resources hold; ValueError, with what was asked and what exists, when not even one."""
    fit = 0
    for node in nodes:
        shares = [node.get("CPU", 0.0) / clients.num_cpus if clients.num_cpus else math.inf]
        gpus = node.get("GPU", 0.0)
        if 0 < clients.num_gpus < 1:  # a fraction lies on one GPU
            shares.append(gpus * math.floor(1 / clients.num_gpus + 1e-6))
        elif clients.num_gpus:
            shares.append(gpus / clients.num_gpus)
        fit += math.floor(min(shares) + 1e-6)
    if fit == 0:
        largest = "no node at all"
        if nodes:
            node = max(nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
            largest = f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs"
        raise ValueError(
            f"a slot needs {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs on one node, but the largest of "
            f"{len(nodes)} has {largest}: lower clients.num_cpus or clients.num_gpus"
        )
    return fit


class Slots:
    """All slots of a run. Calls per round grow with the slots, not with the clients."""

    def __init__(self, federation: Federation, memory: Path) -> None:
        self.federation, self.memory = federation, memory
        fit = slots_that_fit(federation.clients, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        asked = federation.clients.slots
        self.size = fit if asked == "auto" else min(asked, fit)
        self.actors = [self._spawn() for _ in range(self.size)]
        self.holders: dict[tuple[str, str], Any] = {}
        self.parts: Parts | None = None
        self.residual: Reference | None = None
        self.merged: dict[str, Reference] = {}
        self.deaths = 0

    def _spawn(self) -> Any:
        clients = self.federation.clients
        actor = ray.remote(ClientActor).options(num_cpus=clients.num_cpus, num_gpus=clients.num_gpus)
        return actor.remote(self.federation, self.memory)

    def _reader(self, places: list[Place]) -> Any:
        """A slot on the driver's node, where store and base lie; if there is none, an actor that takes no resources."""
        here = ray.get_runtime_context().get_node_id()
        for actor, place in zip(self.actors, places, strict=True):
            if place.node_id == here:
                return actor
        pinned = NodeAffinitySchedulingStrategy(here, soft=False)
        options = ray.remote(ClientActor).options(num_cpus=0, num_gpus=0, scheduling_strategy=pinned)
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
        reader = self._reader(places)
        self.packed, self.base = reader.load_base.options(num_returns=2).remote()
        tokens = reader.tokenize.remote(store, shared)
        try:
            return self._started(reader, tokens, places)
        except LOST as error:
            raise ValueError(
                f"a slot died while it read the base or the rows ({_last_line(error)}); "
                f"if memory ran out, lower clients.slots, or take a smaller base"
            ) from error

    def _started(self, reader: Any, tokens: Any, places: list[Place]) -> Start:
        base_bytes = ray.get(self.packed).nbytes  # first, since a base that is none has no tokenizer either
        self.tokens = Path(ray.get(tokens))
        if not any(reader is actor for actor in self.actors):
            ray.kill(reader)  # what it has read stays in the store, owned by the driver
        attached = ray.get([self._attach(actor) for actor in self.actors])
        layout, initial = attached[0]
        without_gpu = sum(place.gpu is None for place in places) if self.federation.clients.num_gpus else 0
        return Start(layout, initial.copy(), self.tokens, self.size, base_bytes, without_gpu)

    def _attach(self, actor: Any) -> Reference:
        tokens = ray.get(actor.find_tokens.remote(self.tokens))
        if tokens is None:
            self.parts = self.parts or put_tokens(self.tokens)
            tokens = ray.get(actor.receive_tokens.remote(self.tokens, self.parts))
        place = ray.get(actor.place.remote())
        if place.gpu is None:
            return actor.attach.remote(self.packed, self.base, tokens)
        key = (place.node_id, place.gpu)
        if key not in self.holders:
            self.holders[key] = start_holder(*key, self.base)
        return actor.attach.remote(self.packed, self.holders[key].handle.remote(), tokens)

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

    def train(
        self, clients: np.ndarray, costs: np.ndarray, wire: Reference
    ) -> tuple[list[Report], list[PartialSum], dict[int, Reference]]:
        """One round's local work: reports, sorted, partial sums that hold each client once, and updates by client.

        There are references to single updates only if the strategy reads more than sums. A slot that dies takes its sum
        with it: the clients in it are run again elsewhere.
        """
        each: dict[int, Reference] = {}

        def call(actor: Any, chunk: list[int]) -> Reference:
            if self.federation.strategy.reads == "sum":
                return actor.run.remote(chunk, wire)
            # Return values are owned by the driver: they outlive the slot.
            done, *updates = actor.run_each.options(num_returns=1 + len(chunk)).remote(chunk, wire)
            each.update(zip(chunk, updates, strict=True))
            return done

        reports: dict[int, Report] = {}
        partials: list[PartialSum] = []
        todo, self.deaths = clients, 0
        order = dict(zip(clients.tolist(), costs.tolist(), strict=True))
        while len(todo):
            done = self._map(todo, np.array([order[c] for c in todo.tolist()]), call)
            lost: list[int] = []
            closing = {slot: self.actors[slot].close_round.remote() for slot in done}
            for slot, results in done.items():
                try:
                    partials.append(ray.get(closing[slot]))
                    reports |= {report.client: report for report in results}
                except LOST as error:
                    lost += [report.client for report in results]
                    self.replace(slot, error)
            todo = np.array(lost, dtype=clients.dtype)
        return [reports[client] for client in sorted(reports)], partials, each

    def map(self, clients: np.ndarray, costs: np.ndarray, call: Callable[[Any, list[int]], Reference]) -> list[Any]:
        """The results of `call(actor, chunk)` for all `clients` (N,), flat; ValueError when too many slots die.

        `costs` (N,) are in any unit: the longest work is handed out first.
        """
        self.deaths = 0
        return [result for results in self._map(clients, costs, call).values() for result in results]

    def ask(self, call: Callable[[Any], Reference]) -> Any:
        """The result of `call(actor)` in the first slot; one that dies is replaced, ValueError when too many do."""
        self.deaths = 0
        while True:
            try:
                return ray.get(call(self.actors[0]))
            except LOST as error:
                self.replace(0, error)

    def _map(
        self, clients: np.ndarray, costs: np.ndarray, call: Callable[[Any, list[int]], Reference]
    ) -> dict[int, list[Any]]:
        """Slots pull chunks, longest work first. Returns what each slot that is still alive has done."""
        longest_first = clients[np.argsort(-costs, kind="stable")].tolist()
        queue: deque[int] = deque(longest_first)
        idle, running = list(range(self.size)), dict[Reference, tuple[int, list[int]]]()
        chunks: dict[int, list[list[int]]] = {}
        done: dict[int, list[Any]] = {}
        while queue or running:
            while idle and queue:
                slot = idle.pop(0)
                size = max(1, len(queue) // (CHUNKS_PER_SLOT * self.size))
                chunk = [queue.popleft() for _ in range(size)]
                running[call(self.actors[slot], chunk)] = (slot, chunk)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            slot, chunk = running.pop(ready)
            try:
                done.setdefault(slot, []).extend(ray.get(ready))
                chunks.setdefault(slot, []).append(chunk)
            except LOST as error:
                queue.extend(chunk)
                for earlier in chunks.pop(slot, []):
                    queue.extend(earlier)
                done.pop(slot, None)
                self.replace(slot, error)
            idle.append(slot)
        return done

    def replace(self, slot: int, error: Exception) -> None:
        """Puts a new slot into the place of one that `error` tells the death of; ValueError when too many have died."""
        while True:
            self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise ValueError(
                    f"{self.deaths} slots died of the same work, the last so: {_last_line(error)}; "
                    f"if memory ran out, lower clients.slots, train.batch or train.max_length"
                ) from error
            self.actors[slot] = self._spawn()
            try:
                ray.get(self.actors[slot].place.remote(), timeout=START_TIMEOUT_S)
                ray.get(self._attach(self.actors[slot]))
                ray.get(self.actors[slot].refuse_lost_memory.remote())
                ray.get(self._rebase(self.actors[slot]))
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
