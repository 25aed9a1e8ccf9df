"""The kinds of workers: single processes, and gangs of ranks. Each spawns and ends slots, and gives them base and rows.

Their methods raise one of LOST when a slot dies; the pool replaces it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.messages.tasks import Place
from engine.models.mapped_base import start_holder
from engine.scheduling.placement import refuse_shared_gpus
from engine.system.failures import LOST, ShardLost, within
from engine.system.rendezvous import rank_environment
from engine.workers.provider import Provider
from engine.workers.token_columns import TokenPieces, put_tokens
from engine.workers.worker import ClientActor
from engine.workers.worker_group import Gang, Rank
from strategies.core.access import PARTY
from strategies.core.sharding import Partition

Reference = Any  # ray.ObjectRef, whose calls on an untyped actor handle the checker cannot follow
START_TIMEOUT_S = 300.0
WHY_S = 2.0
TOGETHER = ("run", "evaluate", "generate", "masked")


@dataclass
class Patience:
    """How many seconds to wait for a slot; None is without end."""

    work_s: float | None
    answer_s: float | None  # for calls that return at once
    start_s: float | None  # for a base or rows that a slot is given

    @classmethod
    def of(cls, federation: Federation) -> "Patience":
        """Gangs answer late where a rank's collectives wait for another's."""
        allowed, zero = federation.clients.timeout_s, federation.clients.zero
        start_s = allowed and max(allowed, START_TIMEOUT_S)
        return cls(allowed, allowed if zero is None else zero.timeout_s, start_s)


@dataclass
class TokenColumns:
    """The run's token columns in `folder`; `pieces` are a copy in the object store, once a node has needed one."""

    folder: Path
    pieces: TokenPieces | None = None

    def seen_by(self, actor: Any, answer_s: float | None, start_s: float | None) -> Path:
        """Returns the folder where an actor's node has the columns, and brings them there if it does not."""
        seen: Path | None = within(answer_s, actor.find_tokens.remote(self.folder))
        if seen is not None:
            return seen
        self.pieces = self.pieces or put_tokens(self.folder)
        received: Path = within(start_s, actor.receive_tokens.remote(self.folder, self.pieces))
        return received


def spawn_process(federation: Federation, folder: Path, client: type[ClientActor], **options: Any) -> Any:
    """Starts a slot of one process, with the recipe's resources or other `options` of Ray; returns its actor."""
    federation = without_base(federation) if federation.model.has_owner else federation
    resources = {"num_cpus": federation.clients.num_cpus, "num_gpus": federation.clients.num_gpus}
    return ray.remote(client).options(**resources | options).remote(federation, folder)


def spawn_provider(federation: Federation, **options: Any) -> Any:
    """Starts a replica of the base's provider, on a CPU of the slot that waits for it, or on its GPU share."""
    resources = {"num_cpus": 0, "num_gpus": federation.clients.num_gpus}
    return ray.remote(Provider).options(**resources | options).remote(federation)


def without_base(federation: Federation) -> Federation:
    """Returns what slots know of a federation whose base they do not have: neither its place nor that of another."""
    access = replace(federation.model.access, events=())
    clients = replace(federation.clients, num_gpus=0.0, num_cpus=federation.clients.num_cpus or 1.0)
    model = replace(federation.model, base=PARTY, revision=None, start=None, access=access)
    return replace(federation, model=model, clients=clients)


def wait_for_places(actors: list[Any], federation: Federation) -> list[Place]:
    """Waits until all slots have a place; RunError if that takes too long."""
    clients = federation.clients
    try:
        places: list[Place] = ray.get([actor.place.remote() for actor in actors], timeout=START_TIMEOUT_S)
        return places
    except GetTimeoutError:
        raise RunError(
            f"{len(actors)} slots of {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs "
            f"could not be placed within {START_TIMEOUT_S:g} s; Ray has {ray.available_resources()} free: "
            f"wait for other work to end, or lower clients.slots"
        ) from None


def process_beside_driver(spawn: Callable[..., Any], actors: list[Any], places: list[Place]) -> Any:
    """Returns an actor on the driver's node, where store and base lie, else one more, which takes no resources."""
    here = ray.get_runtime_context().get_node_id()
    beside = [actor for actor, place in zip(actors, places, strict=True) if place.node_id == here]
    strategy = NodeAffinitySchedulingStrategy(here, soft=False)
    return beside[0] if beside else spawn(num_cpus=0, num_gpus=0, scheduling_strategy=strategy)


@dataclass
class Processes:
    """Slots of one process each, which share a base that is in the object store or in a GPU holder's memory."""

    federation: Federation
    patience: Patience
    spawn_one: Callable[[], Any]
    packed: Reference  # the base's index
    buffer: Reference  # and its bytes, read once for all slots
    frozen: Sequence[tuple[Reference, Reference]] = ()  # the same of each of the objective's frozen models
    holders: dict[tuple[str, str, int], Any] = field(default_factory=dict)  # by node, GPU and number of the buffer
    providers: dict[Any, Any] = field(default_factory=dict)  # by slot's actor, where the base has an owner
    emulator: tuple[Reference, Reference] | None = None  # index and bytes of what slots train in the base's place
    merged_delta: Reference | None = None
    merged: dict[str, Reference] = field(default_factory=dict)  # the merged weights by node
    may_shrink = True  # the run can continue with fewer of them
    lanes = True  # several clients may train together

    def spawn(self, slot: int) -> Any:
        """Starts a slot and returns its actor."""
        return self.spawn_one()

    def end(self, slot: int, actor: Any) -> None:
        """Ends what is left of a slot, which may be silent and not dead."""
        ray.kill(actor)
        if actor in self.providers:
            ray.kill(self.providers.pop(actor))

    def ranks(self, actor: Any) -> Sequence[Any]:
        """Returns the only one."""
        return [actor]

    def attach(self, actor: Any, columns: TokenColumns, *, first: bool) -> Reference:
        """Gives a slot base and rows; the answer is the layout, and of the `first` slot the initial vector."""
        tokens = columns.seen_by(actor, self.patience.answer_s, self.patience.start_s)
        if self.federation.model.has_owner:
            if actor not in self.providers:  # those of the first slots have been started with them
                self.providers[actor] = spawn_provider(self.federation)
            provider = self.providers[actor]
            if self.emulator is not None:
                files = provider.open_plug_in.remote(self.packed, self.buffer)
                return actor.attach_ends.remote(*self.emulator, tokens, first, provider, files)
            return actor.attach_remote.remote(provider, provider.open.remote(self.packed, self.buffer), tokens, first)
        place: Place = within(self.patience.answer_s, actor.place.remote())
        shares_gpu = place.gpu is not None and self.federation.clients.num_gpus < 1
        indices, buffers = zip((self.packed, self.buffer), *self.frozen, strict=True)
        if shares_gpu:
            buffers = tuple(self._held(place.node_id, str(place.gpu), *each) for each in enumerate(buffers))
        (packed, buffer), *frozen = zip(indices, buffers, strict=True)
        return actor.attach.remote(packed, buffer, tokens, first, *chain.from_iterable(frozen))

    def _held(self, node_id: str, gpu: str, number: int, buffer: Reference) -> Any:
        """Returns where a buffer lies on a GPU that slots share; its holder is made again if need be."""
        key = node_id, gpu, number
        if key in self.holders:
            with suppress(*LOST):
                return within(self.patience.answer_s, self.holders[key].handle.remote())
        self.holders[key] = start_holder(node_id, gpu, buffer)
        return within(self.patience.start_s, self.holders[key].handle.remote())

    def prepare_merge(self, merged_delta: np.ndarray | None) -> None:
        """Sets the merged delta that `merge_into` gives to slots; None: back to the first base."""
        self.merged_delta, self.merged = (None if merged_delta is None else ray.put(merged_delta)), {}

    def merge_into(self, actor: Any) -> None:
        """Gives a new slot its node's weights with the merged delta, made once for each node."""
        if self.federation.model.has_owner:
            return
        answer_s, weights = self.patience.answer_s, None
        if self.merged_delta is not None:
            node = within(answer_s, actor.place.remote()).node_id
            if node not in self.merged:
                merged = actor.merge_weights.remote(self.merged_delta)
                ray.wait([merged], fetch_local=False, timeout=answer_s)
                # If the slot died while merging, do not keep a reference to weights that never come.
                within(answer_s, actor.place.remote())
                self.merged[node] = merged
            weights = self.merged[node]
        within(answer_s, actor.use_merged.remote(weights))

    def close(self, actor: Any, partition: Partition) -> tuple[list[Reference], list[Reference]]:
        """Returns references to the bytes of a slot's sum and to its shards; the slot cuts the sum."""
        nbytes, *shards = actor.close_in_shards.options(num_returns=1 + len(partition.intervals)).remote(partition)
        return [nbytes], shards

    def cause(self, error: Exception, actor: Any) -> Exception:
        """Returns what ended a slot: nobody knows more than the error itself."""
        return error


class GangHandle:
    """Stands in for an actor: calls in TOGETHER go to all ranks, others to the first, which answers.

    Each is asked by itself, and none through the first: if that one is stopped, the others must run into their timeout.
    """

    def __init__(self, leader: Any, *followers: Any) -> None:
        self.leader, self.followers = leader, followers

    def __getattr__(self, method: str) -> Any:
        if method not in TOGETHER:
            return getattr(self.leader, method)

        def remote(*arguments: Any) -> Reference:
            for follower in self.followers:
                follower.follow.remote(self.leader, method, *arguments)
            return self.leader.lead.remote(method, *arguments)

        return SimpleNamespace(remote=remote)


@dataclass(frozen=True)
class Gangs:
    """Slots of several ranks each, made again as a whole when a rank is lost. Each gang reads the base by itself."""

    federation: Federation
    patience: Patience
    folder: Path
    may_shrink = lanes = False

    def spawn(self, slot: int) -> GangHandle:
        """Starts a gang, placed all or nothing, and returns its handle; what was in its place before is removed."""
        clients, zero = self.federation.clients, self.federation.clients.zero
        assert zero is not None
        self.end(slot, None)  # a driver before this one may have left it
        bundle = {name: n for name, n in (("CPU", clients.num_cpus), ("GPU", clients.num_gpus)) if n}
        group = placement_group([bundle] * zero.ranks, strategy="PACK", name=f"{self.folder} gang {slot}")
        environment = {"env_vars": rank_environment(gpu=clients.num_gpus > 0)}
        options = {"num_cpus": clients.num_cpus, "num_gpus": clients.num_gpus, "runtime_env": environment}

        def spawned(rank: int) -> Any:
            there = PlacementGroupSchedulingStrategy(group, rank)
            actor = ray.remote(Rank if rank else Gang).options(**options, scheduling_strategy=there)
            return actor.remote(self.federation, self.folder, rank)

        return GangHandle(*map(spawned, range(zero.ranks)))

    def end(self, slot: int, gang: GangHandle | None) -> None:
        """Removes a gang's placement group: Ray ends what runs in it, stopped or not."""
        with suppress(ValueError):  # there is none
            remove_placement_group(get_placement_group(f"{self.folder} gang {slot}"))

    def ranks(self, gang: GangHandle) -> Sequence[Any]:
        """Returns all ranks, the first one first."""
        return [gang.leader, *gang.followers]

    def attach(self, gang: GangHandle, columns: TokenColumns, *, first: bool) -> Reference:
        """Lets the ranks meet and read base and rows; the answer is the layout, and how vectors are cut."""
        leader, *followers = ranks = self.ranks(gang)
        answer_s, start_s = self.patience.answer_s, self.patience.start_s
        leader_tokens, *tokens = [columns.seen_by(rank, answer_s, start_s) for rank in ranks]
        places = within(answer_s, [rank.place.remote() for rank in ranks])
        refuse_shared_gpus([(place.node_id, place.gpu) for place in places])
        address, port = within(answer_s, leader.address.remote())
        for rank, folder in zip(followers, tokens, strict=True):
            rank.follow.remote(leader, "form", address, port, folder)
        return leader.lead.remote("form", address, port, leader_tokens)

    def prepare_merge(self, merged_delta: np.ndarray | None) -> None:
        """Rules that merge into the base do not work with gangs."""
        assert merged_delta is None

    def merge_into(self, gang: GangHandle) -> None:
        """Does nothing: a gang holds no weights that a rule would have changed."""

    def close(self, gang: GangHandle, partition: Partition) -> tuple[list[Reference], list[Reference]]:
        """Returns references to the bytes of each rank's shard of a gang's sum, and to the shards."""
        closing = [rank.close_round.options(num_returns=2).remote() for rank in self.ranks(gang)]
        return [nbytes for nbytes, _ in closing], [shard for _, shard in closing]

    def cause(self, error: Exception, gang: GangHandle) -> Exception:
        """Returns what ended a gang: where another rank than the first has failed, its error says more."""
        asked = [rank.why.remote() for rank in gang.followers]
        for answer in ray.wait(asked, num_returns=len(asked), timeout=WHY_S)[0] if asked else ():
            with suppress(RayActorError):
                why = ray.get(answer)
                if why is not None and not isinstance(error, ObjectLostError | ShardLost):
                    error = why
        return error


WorkerKind = Processes | Gangs
