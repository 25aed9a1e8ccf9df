"""The pool of a run's slots, of one kind or several: starts them, hands out clients, and replaces slots that die."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.messages.events import Fault
from engine.messages.reports import Report
from engine.messages.shards import ShardedState, ShardSum, ShardTotals
from engine.messages.tasks import Place, Served, Unit, Work
from engine.scheduling.dispatcher import Dispatcher, Later, SlotResults, Worked, units_of
from engine.scheduling.placement import asked_or_fitting, gangs_that_fit, slots_beside_gangs, slots_that_fit
from engine.scheduling.sums import ShardSums, WholeSums
from engine.scheduling.worker_kinds import START_TIMEOUT_S, Gangs, Patience, Processes, Reference, Rows, WorkerKind
from engine.system.atomic import write_folder
from engine.system.failures import LOST, ShardLost, SlotSilent, last_line, within
from engine.workers.worker import ClientActor
from strategies.core.layout import Layout
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums, Totals

MAX_DEATHS = 10  # and one for each slot, with nothing done between: beyond, the machine and not chance is at fault
LOOK_S = 5.0  # between looks at what the cluster has, while a slot waits for a place


@dataclass(frozen=True)
class Start:
    """What the driver learns from the slots before the first round: the initial vector (P,) is empty in shards."""

    layout: Layout
    initial: np.ndarray
    tokens: Path
    slots: int
    base_bytes: int
    without_gpu: int


class Pool:
    """All slots of a run, numbered; `alive` are those that there still are. Calls per round grow with the slots alone.

    `folder` is where client state lies. After `start`, `partition` says how vectors are cut into shards, None if they
    are whole. `later` is work beside the next round's training.
    """

    client: ClassVar[type[ClientActor]] = ClientActor

    def __init__(self, federation: Federation, folder: Path) -> None:
        self.federation = federation
        self.patience = Patience.of(federation)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kinds = self._counted(folder, nodes)
        self.worker_kinds = tuple(kind for kind, _ in kinds)
        self._kind_of = [number for number, (_, count) in enumerate(kinds) for _ in range(count)]
        self.size = len(self._kind_of)
        self.actors = [self._worker_kind(slot).spawn(slot) for slot in range(self.size)]
        self.alive = list(range(self.size))
        self.faults: list[Fault] = []
        self.nodes: dict[int, str] = {}  # where each slot is
        self.deaths = 0
        self.later: list[Later] = []
        self.partition: Partition | None = None
        self.rows_by_client: np.ndarray | None = None

    def _counted(self, folder: Path, nodes: list[dict[str, float]]) -> list[tuple[WorkerKind, int]]:
        """Returns the kinds of slots, and how many there are to be of each: gangs come first."""
        clients, zero = self.federation.clients, self.federation.clients.zero
        processes = Processes(self.federation, folder, self.patience, self.client)
        if zero is None:
            return [(processes, asked_or_fitting(clients, slots_that_fit(clients, nodes)))]
        gangs = Gangs(self.federation, folder, self.patience)
        if not zero.from_rows:
            return [(gangs, asked_or_fitting(clients, gangs_that_fit(clients, zero, nodes)))]
        return [(gangs, zero.gangs), (processes, asked_or_fitting(clients, slots_beside_gangs(clients, zero, nodes)))]

    @property
    def timeout_s(self) -> float | None:
        """How long a slot may work without an answer; None: without end."""
        return self.patience.work_s

    @property
    def _sums(self) -> WholeSums | ShardSums:
        return WholeSums(self) if self.partition is None else self._shard_sums

    @property
    def _shard_sums(self) -> ShardSums:
        assert self.partition is not None
        return ShardSums(self, self.partition)

    def kind_of(self, slot: int) -> int:
        """Returns the number of a slot's kind."""
        return self._kind_of[slot]

    def _worker_kind(self, slot: int) -> WorkerKind:
        return self.worker_kinds[self._kind_of[slot]]

    def kinds(self, clients: np.ndarray) -> np.ndarray:
        """Returns the number of the kind that takes each of `clients` (N,): beside gangs processes take small ones."""
        zero = self.federation.clients.zero
        if len(self.worker_kinds) == 1 or zero is None or self.rows_by_client is None:
            return np.zeros(len(clients), np.int64)
        numbers: np.ndarray = (self.rows_by_client[clients] < zero.from_rows).astype(np.int64)
        return numbers

    def ranks(self, slot: int) -> Sequence[Any]:
        """Returns the actors of a slot's processes, the one that speaks for it first."""
        return self._worker_kind(slot).ranks(slot)

    def start(self, store: Path, shared: str | None = None) -> Start:
        """Reads base and rows beside the driver, then attaches all slots; RunError if that is impossible.

        A slot's death is raised unchanged: no round has run, so the caller starts again.
        `shared` is the location that the store was copied from, if it was: its token columns lie there too.
        """
        clients = self.federation.clients
        try:
            places: list[Place] = ray.get([actor.place.remote() for actor in self.actors], timeout=START_TIMEOUT_S)
        except GetTimeoutError:
            raise RunError(
                f"{self.size} slots of {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs "
                f"could not be placed within {START_TIMEOUT_S:g} s; Ray has {ray.available_resources()} free: "
                f"wait for other work to end, or lower clients.slots"
            ) from None
        self.nodes = {slot: place.node_id for slot, place in enumerate(places)}
        try:
            layout, first = self._attach_all(store, shared, places)
        except LOST as error:
            raise self._cause(error, self.alive) from error
        if self.worker_kinds[0].in_shards:
            self.partition, first = first, np.empty(0, np.float32)
        self.rows_by_client = Tokens.open(self.rows.folder).counts("train")
        without_gpu = sum(place.gpu is None for place in places) if clients.num_gpus else 0
        base_bytes = self.worker_kinds[0].base_bytes()
        return Start(layout, first, self.rows.folder, self.size, base_bytes, without_gpu)

    def _attach_all(self, store: Path, shared: str | None, places: Sequence[Place]) -> Any:
        """Returns the first slot's answer: the layout, and the initial vector or the partition."""
        kind = next((kind for kind in self.worker_kinds if kind.reads_base), self.worker_kinds[0])
        reader = kind.reader(places)
        kind.load_base(reader)  # first, since a base that is none has no tokenizer either
        self.rows = Rows(Path(ray.get(reader.tokenize.remote(store, shared))))
        if not any(reader is actor for actor in self.actors):
            ray.kill(reader)  # what it has read stays in the store, owned by the driver
        return ray.get([self._attach(slot) for slot in range(self.size)])[0]

    def _attach(self, slot: int) -> Reference:
        return self._worker_kind(slot).attach(slot, self.rows)

    def refuse_lost_memory(self) -> None:
        """Raises RunError if clients keep state in a folder that not every process's node sees."""
        for slot in range(self.size):
            self._worker_kind(slot).refuse_lost_memory([slot])

    def rebase(self, merged_delta: np.ndarray | None) -> None:
        """Adds a merged delta (see ServerState) to the base's weights, once a node; None: back to the first base."""
        for kind in self.worker_kinds:
            kind.use_merged(merged_delta)
        self.deaths = 0
        for slot in list(self.alive):
            try:
                self._worker_kind(slot).restore(slot)
            except LOST as error:
                self.replace(slot, error)

    def replace(self, slot: int, error: Exception) -> None:
        """Puts a new slot in the place of one that ended with `error`.

        Where the cluster has no place for it any more, the others go on without it. RunError when too many have died
        while their nodes lived, with nothing done between. A shard of state or sums that is lost with its node is lost
        for all slots: the error is raised, and the caller resumes from the last checkpoint.
        """
        kind = self._worker_kind(slot)
        error = kind.cause(error, [slot])
        if self.partition is not None and isinstance(error, ObjectLostError | ShardLost):
            raise error
        while True:
            self.deaths += not self.lost_with_node(slot)
            self.nodes.pop(slot, None)
            self.faults.append(Fault("slot", str(slot), last_line(error)))
            if self.deaths > MAX_DEATHS + self.size:
                raise RunError(
                    f"{self.deaths} slots died one after another, the last so: {last_line(error)}; "
                    f"if memory ran out, lower clients.slots, train.batch or train.max_length"
                ) from error
            kind.end(slot)
            self.actors[slot] = kind.spawn(slot)
            try:
                if not self._placed(slot):
                    kind.end(slot)
                    self.alive.remove(slot)
                    self.faults.append(Fault("slot", str(slot), "the cluster has no place for another in its stead"))
                    return
                within(self.patience.start_s, self._attach(slot))
                self.answer(self.actors[slot].refuse_lost_memory.remote())
                kind.restore(slot)
                return
            except LOST as again:
                error = again

    def _cause(self, error: Exception, slots: Sequence[int]) -> Exception:
        for slot in slots:
            error = self._worker_kind(slot).cause(error, [slot])
        return error

    def lost_with_node(self, slot: int) -> bool:
        """Whether the node that a slot was placed on is gone."""
        return self.nodes.get(slot) in [node["NodeID"] for node in ray.nodes() if not node["Alive"]]

    def _placed(self, slot: int) -> bool:
        """Waits for a new slot's place; False where the others can go on without it, RunError where nobody can."""
        place = self.actors[slot].place.remote()
        may_shrink = len(self.alive) > 1 and all(kind.may_shrink for kind in self.worker_kinds)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ray.wait([place], timeout=0 if may_shrink and not self._fits() else LOOK_S)[0]:
            late = time.monotonic() > deadline
            if may_shrink and (late or not self._fits()):
                return False
            if late:
                raise RunError(
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
        except RunError:
            return False

    def answer(self, references: Any) -> Any:
        """Returns what slots answer that have nothing else to do; SlotSilent where it takes too long."""
        return within(self.patience.answer_s, references)

    def initial(self) -> ShardedState:
        """Returns the state before the first round, where vectors are cut."""
        return self._shard_sums.initial()

    def serve(self, state: ShardedState, served: Served, sums: list[ShardSum]) -> ShardedState:
        """Returns the next state from all slots' sums, where vectors are cut."""
        self.deaths = 0
        return self._shard_sums.serve(state, served, sums)

    def close(self, slot: int) -> list[tuple[Reference, Reference]]:
        """Returns references to the bytes of each shard of a slot's sum, and to the shard, where vectors are cut."""
        assert self.partition is not None
        return self._worker_kind(slot).close(slot, self.partition)

    def held(self, sums: Sums) -> int:
        """Returns how many coordinates of a masked vector come in a slot's message."""
        return self._sums.held(sums)

    def masked_shards(self, slot: int) -> Any:
        """Returns references to what of a slot's masked vector is not in its message; None if that is nothing."""
        return self._sums.masked_shards(slot)

    def unmasked(
        self, session: Session, total_L: np.ndarray, removals: Masks, shards: list[Any]
    ) -> Totals | ShardTotals:
        """Returns what the server learns from the unmasked sum of the slots' messages, and from their shards."""
        return self._sums.unmasked(session, total_L, removals, shards)

    def stop(self) -> None:
        """Ends all slots."""
        for kind in self.worker_kinds:
            kind.stop()

    def units(self, work: Work, lanes: int) -> list[Unit]:
        """Groups the clients of a round by kind, and into units that train together where their kind has lanes."""
        numbers = self.kinds(work.clients)
        units: list[Unit] = []
        for number, kind in enumerate(self.worker_kinds):
            part = work.of(numbers == number)
            units += units_of(part.clients, part.steps, lanes if kind.lanes else 1)
        return units

    def train(self, work: Work, message: Any, lanes: int) -> Worked:
        """Does one round's local work. A slot that dies takes its sum with it: the units in it run again elsewhere."""
        each: dict[int, Reference] = {}

        def call(actor: Any, chunk: list[Unit]) -> Reference:
            if self.federation.strategy.reads == "sum":
                return actor.run.remote(chunk, message)
            clients = [client for unit in chunk for client in unit]
            # Return values are owned by the driver: they outlive the slot.
            reports, *updates = actor.run_each.options(num_returns=1 + len(clients)).remote(chunk, message)
            each.update(zip(clients, updates, strict=True))
            return reports

        reports: dict[int, Report] = {}
        sums, nbytes, busy = list[Any](), 0, [0.0] * self.size
        finished: dict[int, SlotResults] = {}
        ended: dict[Unit, None] = {}  # in the order in which they were
        todo, self.deaths, lost_sums = self.units(work, lanes), 0, 0
        while todo:
            dispatcher = Dispatcher(self, todo, work.cost, call, self.later, _given_up, finished)
            finished, todo = dispatcher.run(), []
            for report in dispatcher.given_up:
                reports[report.client] = report
                each.pop(report.client, None)  # what it leaves is the error of a dead slot
            taken = self._sums.take(list(finished))
            sums, nbytes = [*sums, *taken.sums], nbytes + taken.nbytes
            for slot in taken.slots:
                part = finished.pop(slot)
                reports |= {report.client: report for report in part.results}
                busy[slot] += sum(report.seconds for report in part.results)
                ended |= dict.fromkeys(part.units)
            for slot, error in taken.lost.items():
                todo += finished.pop(slot).units
                lost_sums += 1
                self.deaths = max(self.deaths, lost_sums)  # whatever was done between is lost with them
                self.replace(slot, error)
            if self.faults:  # updates may have lain on a node that is gone
                lost = {client for client, update in each.items() if is_lost(update)}
                todo += [unit for unit in ended if lost & {*unit} and unit not in todo]
        return Worked([reports[client] for client in sorted(reports)], sums, nbytes, each, busy)

    def map(self, clients: np.ndarray, costs: np.ndarray, call: Callable[[Any, list[int]], Reference]) -> list[Any]:
        """Returns the results of `call(actor, chunk)` for all `clients` (N,), flat; RunError when too many slots die.

        `costs` (N,) are in any unit of a second or more: the longest work is handed out first.
        """
        self.deaths = 0
        units: list[Unit] = [(client,) for client in clients.tolist()]
        cost = dict(zip(units, costs.tolist(), strict=True)).__getitem__
        dispatcher = Dispatcher(self, units, cost, lambda actor, chunk: call(actor, [client for (client,) in chunk]))
        return [result for part in dispatcher.run().values() for result in part.results]

    def ask(self, call: Callable[[Any], Reference], *, long: bool = False) -> Any:
        """Returns the result of `call(actor)` in the first slot; one that dies is replaced, RunError when too many do.

        A slot that exceeds clients.timeout_s is replaced too, unless the answer may take `long`.
        """
        self.deaths = 0
        while True:
            try:
                return within(None if long else self.timeout_s, call(self.actors[self.alive[0]]))
            except LOST as error:
                self.replace(self.alive[0], error)

    def export(self, folder: Path, message: Any, card: str) -> None:
        """Writes the model folder: files come one at a time, from the first slot; one that dies is replaced."""
        self.deaths = 0

        def files() -> Iterator[tuple[str, bytes]]:
            coming = self.actors[self.alive[0]].export.options(num_returns="streaming").remote(message, card)
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


def is_lost(update: Reference) -> bool:
    """Whether what a reference stands for is gone."""
    try:
        ray.get(update)
        return False
    except LOST:
        return True
