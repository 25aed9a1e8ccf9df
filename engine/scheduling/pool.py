"""The pool of a run's slots, of one kind or several: starts them, hands out clients, and replaces slots that die."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from datasets_partition.store.tokens import Tokens
from engine.aggregation.exact_sum import BLOCK, PartialSum, merge_sections
from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.messages.events import Fault
from engine.messages.reports import Report
from engine.messages.tasks import Unit, Work
from engine.scheduling import worker_kinds as kinds
from engine.scheduling.dispatcher import Dispatcher, Later, SlotResults, Worked, units_of
from engine.scheduling.placement import slot_counts, slots_that_fit
from engine.scheduling.worker_kinds import START_TIMEOUT_S, Patience, Reference, TokenColumns, WorkerKind
from engine.system.atomic import write_folder
from engine.system.failures import LOST, ShardLost, SlotSilent, last_line, within
from engine.workers.worker import ClientActor
from strategies.core.layout import Layout
from strategies.core.sharding import Partition

MAX_DEATHS = 10  # and one for each slot, with nothing done between: beyond, the machine and not chance is at fault
LOOK_S = 5.0  # between looks at what the cluster has, while a slot waits for a place
SECTION = 64 * BLOCK  # elements of a sum that are handed over at once, so that no store needs to hold all of it
# Sums by the slots that have handed them over, their bytes in the store, and how other slots ended meanwhile.
Taken = tuple[dict[tuple[int, ...], Any], int, dict[int, Exception]]


@dataclass(eq=False)
class Pool:
    """All slots of a run, numbered; `alive` are those that there still are. Calls per round grow with the slots alone.

    `kind_of` is the number of each slot's kind, `nodes` where each slot is. Where vectors are whole, `initial` is that
    (P,) before the first round; else `partition` says how they are cut into shards. `without_gpu` slots were to have
    a GPU and see none. `later` is work beside the next round's training. `client` is the actor of a slot of one
    process, in whose place tests and the benchmark of null clients put their own.
    """

    federation: Federation
    patience: Patience
    worker_kinds: tuple[WorkerKind, ...]
    kind_of: list[int]
    actors: list[Any]
    nodes: dict[int, str]
    columns: TokenColumns
    layout: Layout
    initial: np.ndarray | None
    partition: Partition | None
    base_bytes: int
    without_gpu: int
    faults: list[Fault] = field(default_factory=list)
    later: list[Later] = field(default_factory=list)
    deaths: int = 0
    client: ClassVar[type[ClientActor]] = ClientActor

    def __post_init__(self) -> None:
        self.alive = list(range(self.size))
        self.rows_by_client = Tokens.open(self.columns.folder).counts("train")

    @classmethod
    def start(cls, federation: Federation, folder: Path, store: Path, shared: str | None = None) -> "Pool":
        """Starts all slots, reads base and rows beside the driver, and gives slots both; RunError if it is impossible.

        `folder` is where client state lies. `shared` is the location that the store was copied from, if it was: its
        token columns lie there too. A slot's death is raised unchanged: no round has run, so the caller starts again.
        """
        gangs, processes = slot_counts(federation.clients, _resources())
        kind_of = [0] * gangs + [int(gangs > 0)] * processes
        patience = Patience.of(federation)
        worker_kinds: tuple[WorkerKind, ...] = (kinds.Gangs(federation, patience, folder),) if gangs else ()
        actors: list[Any] = [worker_kinds[0].spawn(slot) for slot in range(gangs)]
        spawn = partial(kinds.spawn_process, federation, folder, cls.client)
        actors += [spawn() for _ in range(processes)]
        # Where slots have no base, providers have, and start at the same time.
        has_owner, may_read = federation.model.has_owner, actors[gangs:]
        providers = {actor: kinds.spawn_provider(federation) for actor in actors} if has_owner else {}
        places = kinds.wait_for_places(actors, federation)

        reader, base_bytes = actors[0], 0
        if processes:
            where, spawn_reader = places[gangs:], spawn
            if providers:
                may_read, spawn_reader = [*providers.values()], partial(kinds.spawn_provider, federation)
                where = kinds.wait_for_places(may_read, federation)
            reader = kinds.process_beside_driver(spawn_reader, may_read, where)
            stored, packed, buffer = reader.load_base.options(num_returns=3).remote()
            base_bytes = ray.get(stored)  # first, since a base that is none has no tokenizer either
            frozen = []
            for number in range(len(federation.train.objective.models)):
                stored, *model = reader.load_frozen.options(num_returns=3).remote(number)
                ray.get(stored)
                frozen.append(model)
            processes_kind = kinds.Processes(federation, patience, spawn, packed, buffer, frozen, providers=providers)
            if federation.model.peft.plugs_in:
                stored, *emulator = reader.load_emulator.options(num_returns=3).remote(packed, buffer)
                ray.get(stored)
                processes_kind.emulator = (emulator[0], emulator[1])
            worker_kinds += (processes_kind,)
        columns = TokenColumns(Path(ray.get(reader.tokenize.remote(store, shared))))
        if all(reader is not actor for actor in (*actors, *may_read)):
            ray.kill(reader)  # what it has read stays in the store, owned by the driver

        members = [(worker_kinds[kind], actor) for kind, actor in zip(kind_of, actors, strict=True)]
        try:
            attached = [kind.attach(actor, columns, first=not slot) for slot, (kind, actor) in enumerate(members)]
            layout, vector = ray.get(attached)[0]
        except LOST as error:
            cause: Exception = error
            for kind, actor in members:
                cause = kind.cause(cause, actor)
            raise cause from error
        if gangs:
            base_bytes = ray.get(actors[0].base_bytes.remote())
        nodes = {slot: place.node_id for slot, place in enumerate(places)}
        wants_gpu = federation.clients.num_gpus > 0 and not has_owner
        without_gpu = sum(place.gpu is None for place in places) if wants_gpu else 0
        facts = (layout, *((None, vector) if gangs else (vector, None)), base_bytes, without_gpu)
        return cls(federation, patience, worker_kinds, kind_of, actors, nodes, columns, *facts)

    @property
    def size(self) -> int:
        """How many slots there were at the start."""
        return len(self.kind_of)

    @property
    def timeout_s(self) -> float | None:
        """How long a slot may work without an answer; None: without end."""
        return self.patience.work_s

    def _kind(self, slot: int) -> WorkerKind:
        return self.worker_kinds[self.kind_of[slot]]

    def kinds_for(self, clients: np.ndarray) -> np.ndarray:
        """Returns the number of the kind that takes each of `clients` (N,): beside gangs processes take small ones."""
        zero = self.federation.clients.zero
        if len(self.worker_kinds) == 1 or zero is None:
            return np.zeros(len(clients), np.int64)
        return np.where(self.rows_by_client[clients] < zero.from_rows, 1, 0)

    def ranks(self, slot: int) -> Sequence[Any]:
        """Returns the actors of a slot's processes, the one that speaks for it first."""
        return self._kind(slot).ranks(self.actors[slot])

    def refuse_lost_states(self) -> None:
        """Raises RunError if clients keep state in a folder that not every process's node sees."""
        ray.get([rank.refuse_lost_states.remote() for slot in self.alive for rank in self.ranks(slot)])

    def merge_into_base(self, merged_delta: np.ndarray | None) -> None:
        """Adds a merged delta (see ServerState) to the base's weights, once a node; None: back to the first base."""
        for kind in self.worker_kinds:
            kind.prepare_merge(merged_delta)
        self.deaths = 0
        for slot in list(self.alive):
            try:
                self._kind(slot).merge_into(self.actors[slot])
            except LOST as error:
                self.replace(slot, error)

    def replace(self, slot: int, error: Exception) -> None:
        """Puts a new slot in the place of one that ended with `error`.

        Where the cluster has no place for it any more, the others go on without it. RunError when too many have died
        while their nodes lived, with nothing done between. A shard of state or sums that is lost with its node is lost
        for all slots: the error is raised, and the caller resumes from the last checkpoint.
        """
        kind = self._kind(slot)
        error = kind.cause(error, self.actors[slot])
        if self.partition is not None and isinstance(error, ObjectLostError | ShardLost):
            raise error
        while True:
            self.deaths += not self.lost_with_node(slot)
            self.nodes.pop(slot, None)
            self.faults.append(Fault("slot", str(slot), last_line(error)))
            if self.deaths > MAX_DEATHS + self.size:
                raise RunError(
                    f"{self.deaths} slots died one after another, the last because: {last_line(error)}; "
                    f"if memory ran out, lower clients.slots, train.batch or train.max_length"
                ) from error
            kind.end(slot, self.actors[slot])
            actor = self.actors[slot] = kind.spawn(slot)
            try:
                if not self._placed(slot):
                    kind.end(slot, actor)
                    self.alive.remove(slot)
                    self.faults.append(Fault("slot", str(slot), "the cluster has no place for another in its stead"))
                    return
                within(self.patience.start_s, kind.attach(actor, self.columns, first=False))
                self.answer([rank.refuse_lost_states.remote() for rank in kind.ranks(actor)])
                kind.merge_into(actor)
                return
            except LOST as again:
                error = again

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
        try:
            return slots_that_fit(self.federation.clients, _resources()) >= len(self.alive)
        except RunError:
            return False

    def answer(self, references: Any) -> Any:
        """Returns what slots answer that have nothing else to do; SlotSilent where it takes too long."""
        return within(self.patience.answer_s, references)

    def stop(self) -> None:
        """Ends all slots; what they share ends with the last reference to it."""
        for slot, actor in enumerate(self.actors):
            self._kind(slot).end(slot, actor)

    def units(self, work: Work, lanes: int) -> list[Unit]:
        """Groups the clients of a round by kind, and into units that train together where their kind has lanes."""
        numbers = self.kinds_for(work.clients)
        by_kind = [(work.of(numbers == number), kind.lanes) for number, kind in enumerate(self.worker_kinds)]
        return [unit for its, many in by_kind for unit in units_of(its.clients, its.steps, lanes if many else 1)]

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

        def give_up(client: int, why: str) -> Report:
            return Report.of_nothing(client, (f"its slot died of it: {why}",))

        reports: dict[int, Report] = {}
        sums, nbytes, busy = list[Any](), 0, [0.0] * self.size
        finished: dict[int, SlotResults] = {}
        ended: dict[Unit, None] = {}  # in the order in which they were
        todo, self.deaths, lost_sums = self.units(work, lanes), 0, 0
        while todo:
            dispatcher = Dispatcher(self, todo, work.cost, call, self.later, give_up, finished)
            finished, todo = dispatcher.run(), []
            for report in dispatcher.given_up:
                reports[report.client] = report
                each.pop(report.client, None)  # what it leaves is the error of a dead slot
            take = self._whole_sum if self.partition is None else self._cut_sums
            taken, size, died = take(tuple(finished))
            nbytes += size
            for slots, total in taken.items():
                sums += [] if total is None else [total]
                for slot in slots:
                    of_slot = finished.pop(slot)
                    reports |= {report.client: report for report in of_slot.results}
                    busy[slot] += sum(report.seconds for report in of_slot.results)
                    ended |= dict.fromkeys(of_slot.units)
            for slot, error in died.items():
                todo += finished.pop(slot).units
                lost_sums += 1
                self.deaths = max(self.deaths, lost_sums)  # whatever was done between is lost with them
                self.replace(slot, error)
            if self.faults:  # updates may have lain on a node that is gone
                lost = {client for client, update in each.items() if is_lost(update)}
                todo += [unit for unit in ended if lost & {*unit} and unit not in todo]
        return Worked([reports[client] for client in sorted(reports)], sums, nbytes, each, busy)

    def _whole_sum(self, slots: tuple[int, ...]) -> Taken:
        """Returns one sum over all these slots, taken by sections, so that nobody holds the slots' wide integers.

        All slots keep theirs until it is whole: if one dies meanwhile, the others still have them. If the rule reads
        single updates, there is no sum, and this shows who is still alive.
        """
        if not slots:
            return {}, 0, {}
        asked, nbytes = slots[0], 0

        def sections() -> Iterator[list[PartialSum]]:
            nonlocal asked, nbytes
            first, coming = 0, [self.actors[slot].section_of_sum.remote(0, SECTION) for slot in slots]
            while coming:
                section = list[PartialSum]()
                for slot in slots:
                    asked = slot
                    section.append(self.answer(coming.pop(0)))
                first, nbytes = first + SECTION, nbytes + sum(partial.nbytes for partial in section)
                if any(first < length for partial in section for length in partial.lengths.values()):
                    coming = [self.actors[slot].section_of_sum.remote(first, SECTION) for slot in slots]
                yield section

        try:
            total = merge_sections(sections())
        except LOST as error:
            return {}, nbytes, {asked: error}
        for slot in slots:
            self.actors[slot].forget_sum.remote()
        return {slots: total}, nbytes, {}

    def _cut_sums(self, slots: tuple[int, ...]) -> Taken:
        """Returns each slot's sum as references to its shards, which stay in the store."""
        assert self.partition is not None
        closing = {slot: self._kind(slot).close(self.actors[slot], self.partition) for slot in slots}
        sums, nbytes, lost = dict[tuple[int, ...], Any](), 0, dict[int, Exception]()
        for slot, (sizes, shards) in closing.items():
            try:
                nbytes += sum(self.answer(sizes))
                sums[slot,] = tuple(shards)
            except LOST as error:
                lost[slot] = error
        return sums, nbytes, lost

    def map(self, clients: np.ndarray, costs: np.ndarray, call: Callable[[Any, list[int]], Reference]) -> list[Any]:
        """Returns the results of `call(actor, chunk)` for `clients` (N,), flat; the largest `costs` (N,) come first."""
        self.deaths = 0
        units: list[Unit] = [(client,) for client in clients.tolist()]
        cost = dict(zip(units, costs.tolist(), strict=True)).__getitem__
        dispatcher = Dispatcher(self, units, cost, lambda actor, chunk: call(actor, [client for (client,) in chunk]))
        return [result for of_slot in dispatcher.run().values() for result in of_slot.results]

    def ask(self, call: Callable[[Any], Reference], *, long: bool = False) -> Any:
        """Returns the result of `call(actor)` in the first slot, without a time limit if it may take `long`."""
        return self.retried(lambda actor: within(None if long else self.timeout_s, call(actor)))

    def export(self, folder: Path, message: Any, card: str) -> None:
        """Writes the model folder: files come one at a time, from the first slot; one that dies is replaced."""

        def files(actor: Any) -> Iterator[tuple[str, bytes]]:
            coming = actor.export.options(num_returns="streaming").remote(message, card)
            while True:
                if not ray.wait([coming], timeout=self.timeout_s)[0]:
                    raise SlotSilent(f"no answer for {self.timeout_s:g} s")
                try:
                    yield ray.get(next(coming))
                except StopIteration:
                    return

        self.retried(lambda actor: write_folder(folder, files(actor)))

    def retried(self, work: Callable[[Any], Any]) -> Any:
        """Returns what `work` does with the first slot, and does it again with another when that slot dies."""
        self.deaths = 0
        while True:
            try:
                return work(self.actors[self.alive[0]])
            except LOST as error:
                self.replace(self.alive[0], error)


def _resources() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def is_lost(update: Reference) -> bool:
    """Whether what a reference stands for is gone."""
    try:
        ray.get(update)
        return False
    except LOST:
        return True
