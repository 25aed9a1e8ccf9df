"""The kinds of workers: single processes, and gangs of ranks. Each kind places its slots, equips and ends them."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from engine.config.federation import Federation
from engine.messages.tasks import Place
from engine.models.mapped_base import start_holder
from engine.scheduling.placement import refuse_shared_gpus
from engine.system.failures import LOST, ShardLost, within
from engine.system.rendezvous import rank_environment
from engine.workers.token_columns import Parts, put_tokens
from engine.workers.worker import ClientActor
from engine.workers.worker_group import Gang, Rank
from strategies.core.sharding import Partition

Reference = Any  # ray.ObjectRef, whose calls on an untyped actor handle the checker cannot follow
START_TIMEOUT_S = 300.0
WHY_S = 2.0
TOGETHER = ("run", "evaluate", "generate", "masked")


@dataclass
class Patience:
    """How many seconds to wait for a slot; None is without end.

    `work_s` is for work, `answer_s` for calls that return at once, `start_s` for a base or rows that a slot is given.
    """

    work_s: float | None
    answer_s: float | None
    start_s: float | None

    @classmethod
    def of(cls, federation: Federation) -> "Patience":
        """Gangs answer late where a rank's collectives wait for another's."""
        allowed, zero = federation.clients.timeout_s, federation.clients.zero
        start_s = allowed and max(allowed, START_TIMEOUT_S)
        return cls(allowed, allowed if zero is None else zero.timeout_s, start_s)


@dataclass
class Rows:
    """The run's token columns in `folder`; `parts` are a copy in the object store, once a node has needed one."""

    folder: Path
    parts: Parts | None = None

    def seen_by(self, actor: Any, answer_s: float | None, start_s: float | None) -> Path:
        """Returns the folder where an actor's node has the columns, and brings them there if it does not."""
        seen: Path | None = within(answer_s, actor.find_tokens.remote(self.folder))
        if seen is not None:
            return seen
        self.parts = self.parts or put_tokens(self.folder)
        received: Path = within(start_s, actor.receive_tokens.remote(self.folder, self.parts))
        return received


class Slots:
    """What kinds of slots share. Their methods raise one of LOST when a slot dies; the pool replaces it."""

    def __init__(self, federation: Federation, folder: Path, patience: Patience) -> None:
        self.federation, self.folder, self.patience = federation, folder, patience

    def ranks(self, slot: int) -> Sequence[Any]:
        """Returns the actors of a slot's processes, the one that speaks for it first."""
        raise NotImplementedError

    def refuse_lost_memory(self, slots: Iterable[int]) -> None:
        """Raises RunError if clients keep state in a folder that a process of these slots does not see."""
        ray.get([rank.refuse_lost_memory.remote() for slot in slots for rank in self.ranks(slot)])


class Processes(Slots):
    """Slots of one process each, which share a base that is in the object store or in a GPU holder's memory."""

    may_shrink = True  # the run can continue with fewer of them
    lanes = True  # several clients may train together
    reads_base = True  # one of them reads the base for all
    in_shards = False  # vectors are whole

    def __init__(
        self, federation: Federation, folder: Path, patience: Patience, actor: type[ClientActor] = ClientActor
    ) -> None:
        super().__init__(federation, folder, patience)
        self.actor, self.actors = actor, dict[int, Any]()
        self.holders: dict[tuple[str, str], Any] = {}
        self.merged_delta: Reference | None = None
        self.merged: dict[str, Reference] = {}  # the merged weights by node

    def spawn(self, slot: int) -> Any:
        """Starts a slot and returns its actor."""
        clients = self.federation.clients
        options = ray.remote(self.actor).options(num_cpus=clients.num_cpus, num_gpus=clients.num_gpus)
        self.actors[slot] = options.remote(self.federation, self.folder)
        return self.actors[slot]

    def end(self, slot: int) -> None:
        """Ends what is left of a slot, which may be silent and not dead."""
        ray.kill(self.actors[slot])

    def ranks(self, slot: int) -> Sequence[Any]:
        """Returns the only one."""
        return [self.actors[slot]]

    def reader(self, places: Sequence[Place]) -> Any:
        """Returns a slot on the driver's node, where store and base lie, else an actor that takes no resources."""
        here = ray.get_runtime_context().get_node_id()
        for slot, actor in self.actors.items():
            if places[slot].node_id == here:
                return actor
        pinned = NodeAffinitySchedulingStrategy(here, soft=False)
        options = ray.remote(self.actor).options(num_cpus=0, num_gpus=0, scheduling_strategy=pinned)
        return options.remote(self.federation, self.folder)

    def load_base(self, reader: Any) -> None:
        """Lets the base be read into the object store, once for all slots."""
        nbytes, self.packed, self.base = reader.load_base.options(num_returns=3).remote()
        self.nbytes: int = ray.get(nbytes)

    def base_bytes(self) -> int:
        """Returns the bytes of the base."""
        return self.nbytes

    def attach(self, slot: int, rows: Rows) -> Reference:
        """Gives a slot base and rows; the answer is the layout, and the initial vector if it is the first slot."""
        actor = self.actors[slot]
        tokens = rows.seen_by(actor, self.patience.answer_s, self.patience.start_s)
        place = self._answer(actor.place.remote())
        shares_gpu = place.gpu is not None and self.federation.clients.num_gpus < 1
        base = self._held(place.node_id, str(place.gpu)) if shares_gpu else self.base
        return actor.attach.remote(self.packed, base, tokens, slot == 0)

    def _held(self, node_id: str, gpu: str) -> Any:
        """Returns where the base lies on a GPU that slots share; its holder is made again if need be."""
        key = node_id, gpu
        if key in self.holders:
            try:
                return self._answer(self.holders[key].handle.remote())
            except LOST:
                pass
        self.holders[key] = start_holder(node_id, gpu, self.base)
        return within(self.patience.start_s, self.holders[key].handle.remote())

    def use_merged(self, merged_delta: np.ndarray | None) -> None:
        """Sets the merged delta that `restore` gives to slots; None: back to the first base."""
        self.merged_delta, self.merged = (None if merged_delta is None else ray.put(merged_delta)), {}

    def restore(self, slot: int) -> None:
        """Gives a new slot its node's weights with the merged delta, made once for each node."""
        actor = self.actors[slot]
        if self.merged_delta is None:
            self._answer(actor.use_weights.remote(None))
            return
        node = self._answer(actor.place.remote()).node_id
        if node not in self.merged:
            merged = actor.merged_weights.remote(self.merged_delta)
            ray.wait([merged], fetch_local=False, timeout=self.patience.answer_s)
            # If the slot died while merging, do not keep a reference to weights that never come.
            self._answer(actor.place.remote())
            self.merged[node] = merged
        self._answer(actor.use_weights.remote(self.merged[node]))

    def close(self, slot: int, partition: Partition) -> list[tuple[Reference, Reference]]:
        """Returns references to the bytes of each shard of a slot's sum, and to the shard; the slot cuts its sum."""
        ranks = len(partition.parts)
        nbytes, *shards = self.actors[slot].close_in_shards.options(num_returns=1 + ranks).remote(partition)
        nothing = ray.put(0)
        return [(nbytes if rank == 0 else nothing, shard) for rank, shard in enumerate(shards)]

    def cause(self, error: Exception, slots: Iterable[int]) -> Exception:
        """Returns what ended one of these slots: nobody knows more than the error itself."""
        return error

    def stop(self) -> None:
        """Ends all slots, and what they share."""
        for actor in (*self.actors.values(), *self.holders.values()):
            ray.kill(actor)

    def _answer(self, references: Any) -> Any:
        return within(self.patience.answer_s, references)


class GangHandle:
    """Stands in for an actor: calls in TOGETHER go to all ranks, others to the first, which answers.

    Each is asked by itself, and none through the first: if that one is stopped, the others must run into their timeout.
    """

    def __init__(self, leader: Any, *followers: Any) -> None:
        self.leader, self.followers = leader, followers

    def __getattr__(self, method: str) -> Any:
        return Together(self, method) if method in TOGETHER else getattr(self.leader, method)


@dataclass(frozen=True)
class Together:
    """A method of all ranks."""

    gang: GangHandle
    method: str

    def remote(self, *arguments: Any) -> Reference:
        """Returns a reference to what the first rank answers."""
        for follower in self.gang.followers:
            follower.follow.remote(self.gang.leader, self.method, *arguments)
        return self.gang.leader.lead.remote(self.method, *arguments)


class Gangs(Slots):
    """Slots of several ranks each: placed all or nothing, and made again as a whole when a rank is lost.

    Each gang reads the base by itself.
    """

    may_shrink, lanes, reads_base, in_shards = False, False, False, True

    def __init__(self, federation: Federation, folder: Path, patience: Patience) -> None:
        super().__init__(federation, folder, patience)
        assert federation.clients.zero is not None
        self.zero = federation.clients.zero
        self.groups: dict[int, PlacementGroup] = {}
        self.handles: dict[int, GangHandle] = {}

    def spawn(self, slot: int) -> Any:
        """Starts a gang and returns its handle; what was in its place before is gone."""
        clients = self.federation.clients
        name = f"{self.folder} gang {slot}"  # by which a driver finds what one before it has left
        with suppress(ValueError):  # there is none
            remove_placement_group(get_placement_group(name))  # Ray ends what runs in it, stopped or not
        bundle = {"CPU": clients.num_cpus, "GPU": clients.num_gpus}
        bundle = {name: share for name, share in bundle.items() if share}
        self.groups[slot] = placement_group([bundle] * self.zero.ranks, strategy="PACK", name=name)
        ranks = [
            ray.remote(Rank if rank else Gang)
            .options(
                num_cpus=clients.num_cpus,
                num_gpus=clients.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.groups[slot], rank),
                runtime_env={"env_vars": rank_environment(gpu=clients.num_gpus > 0)},
            )
            .remote(self.federation, self.folder, rank)
            for rank in range(self.zero.ranks)
        ]
        self.handles[slot] = GangHandle(*ranks)
        return self.handles[slot]

    def end(self, slot: int) -> None:
        """Does nothing: `spawn` removes the old placement group and all that runs in it."""

    def ranks(self, slot: int) -> Sequence[Any]:
        """Returns all ranks, the first one first."""
        return [self.handles[slot].leader, *self.handles[slot].followers]

    def reader(self, places: Sequence[Place]) -> Any:
        """Returns the first gang, which makes the token columns alone."""
        return self.handles[0]

    def load_base(self, reader: Any) -> None:
        """Nothing is read for all."""

    def base_bytes(self) -> int:
        """Returns the bytes of the base, which the ranks of the first gang hold together."""
        nbytes: int = ray.get(self.handles[0].leader.base_bytes.remote())
        return nbytes

    def attach(self, slot: int, rows: Rows) -> Reference:
        """Lets the ranks meet and read base and rows; the answer is the layout, and how vectors are cut."""
        leader, *followers = ranks = self.ranks(slot)
        leader_tokens, *tokens = [rows.seen_by(rank, None, None) for rank in ranks]
        places: list[Place] = ray.get([rank.place.remote() for rank in ranks])
        refuse_shared_gpus([(place.node_id, place.gpu) for place in places])
        address, port = ray.get(leader.address.remote())
        for rank, folder in zip(followers, tokens, strict=True):
            rank.follow.remote(leader, "form", address, port, folder)
        return leader.lead.remote("form", address, port, leader_tokens)

    def use_merged(self, merged_delta: np.ndarray | None) -> None:
        """Rules that merge into the base do not work with gangs."""
        assert merged_delta is None

    def restore(self, slot: int) -> None:
        """Asks all ranks for the folder of client state; a gang holds no weights that a rule would have changed."""
        self.refuse_lost_memory([slot])

    def close(self, slot: int, partition: Partition) -> list[tuple[Reference, Reference]]:
        """Returns references to the bytes of each rank's shard of a gang's sum, and to the shard."""
        return [rank.close_round.options(num_returns=2).remote() for rank in self.ranks(slot)]

    def cause(self, error: Exception, slots: Iterable[int]) -> Exception:
        """Returns what ended one of these gangs: where another rank than the first has failed, its error says more."""
        asked = [rank.why.remote() for slot in slots for rank in self.handles[slot].followers]
        for answer in ray.wait(asked, num_returns=len(asked), timeout=WHY_S)[0] if asked else ():
            with suppress(RayActorError):
                why = ray.get(answer)
                if why is not None and not isinstance(error, ObjectLostError | ShardLost):
                    error = why
        return error

    def stop(self) -> None:
        """Ends all gangs."""
        for group in self.groups.values():
            remove_placement_group(group)


WorkerKind = Processes | Gangs
