"""The pool where each slot is a gang: placed all or nothing, and made whole again when it loses a rank."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.config.federation import Federation
from engine.messages.tasks import Place
from engine.messages.wire import ShardedState, ShardSum, ShardTotals
from engine.scheduling.placement import asked_or_fitting, refuse_shared_gpus, slots_that_fit
from engine.scheduling.pool import Reference, Start
from engine.scheduling.slots import Slots, Taken
from engine.system.failures import LOST, ShardLost
from engine.system.rendezvous import rank_environment
from engine.workers.token_columns import put_tokens
from engine.workers.worker_group import Gang, Rank, Served
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums

WHY_S = 2.0
TOGETHER = ("run", "evaluate", "generate", "masked")


class GangHandle:
    """What the pool calls as it calls a slot's actor: all ranks do at once what is for all; the first one answers.

    Not through the first one: it may be stopped, and then the others must run into their timeout.
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
        """A reference to what the first rank answers."""
        for follower in self.gang.followers:
            follower.follow.remote(self.gang.leader, self.method, *arguments)
        return self.gang.leader.lead.remote(self.method, *arguments)


class Gangs(Slots):
    """All gangs of a run."""

    may_shrink = False

    def __init__(self, federation: Federation, memory: Path) -> None:
        assert federation.clients.zero is not None
        self.zero = federation.clients.zero
        self.groups: dict[int, PlacementGroup] = {}
        self.ranks: dict[int, list[Any]] = {}
        super().__init__(federation, memory)
        self.patience_s = self.zero.timeout_s

    def _count(self, nodes: list[dict[str, float]]) -> int:
        clients, ranks = self.federation.clients, self.zero.ranks
        fit = slots_that_fit(clients, nodes) // ranks
        if fit == 0:
            has = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
            raise ValueError(
                f"a gang needs {ranks} ranks of {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs each, but all "
                f"nodes together have {has['CPU']:g} CPUs and {has['GPU']:g} GPUs: lower clients.zero.ranks, "
                f"clients.num_cpus or clients.num_gpus"
            )
        return asked_or_fitting(clients, fit)

    def _spawn(self, slot: int) -> Any:
        """A gang in the place of `slot`; of what was there before nothing is left."""
        clients = self.federation.clients
        name = f"{self.memory} gang {slot}"  # by which a driver finds what one before it has left
        with suppress(ValueError):  # there is none
            remove_placement_group(get_placement_group(name))  # Ray ends what runs in it, stopped or not
        bundle = {"CPU": clients.num_cpus, "GPU": clients.num_gpus}
        bundle = {name: share for name, share in bundle.items() if share}
        self.groups[slot] = placement_group([bundle] * self.zero.ranks, strategy="PACK", name=name)
        self.ranks[slot] = [
            ray.remote(Rank if rank else Gang)
            .options(
                num_cpus=clients.num_cpus,
                num_gpus=clients.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.groups[slot], rank),
                runtime_env={"env_vars": rank_environment(gpu=clients.num_gpus > 0)},
            )
            .remote(self.federation, self.memory, rank)
            for rank in range(self.zero.ranks)
        ]
        return GangHandle(*self.ranks[slot])

    def replace(self, slot: int, error: Exception) -> None:
        """As the pool of slots does.

        A shard of a state or a sum that is lost with its node is not to be had again by any slot: the error goes on, to
        who goes back to the last checkpoint.
        """
        error = self._known(error, [slot])
        if isinstance(error, ObjectLostError | ShardLost):
            raise error
        super().replace(slot, error)

    def _known(self, error: Exception, slots: Iterable[int]) -> Exception:
        """What ended a gang of these slots: where another rank than the first failed, it knows better why."""
        asked = [rank.why.remote() for slot in slots for rank in self._followers(slot)]
        for answer in ray.wait(asked, num_returns=len(asked), timeout=WHY_S)[0]:
            with suppress(RayActorError):
                why = ray.get(answer)
                if why is not None and not isinstance(error, ObjectLostError | ShardLost):
                    error = why
        return error

    def _followers(self, slot: int) -> list[Any]:
        """The ranks of a gang but the first; beside gangs, a plain slot has none."""
        return self.ranks.get(slot, [])[1:]

    def refuse_lost_memory(self) -> None:
        """As the pool of slots does; every rank remembers its own shards."""
        super().refuse_lost_memory()
        for slot in self.ranks:
            self._refuse_lost_memory(slot)

    def _refuse_lost_memory(self, slot: int) -> None:
        ray.get([rank.refuse_lost_memory.remote() for rank in self._followers(slot)])

    def _reader(self, places: list[Place]) -> Any:
        """The first gang: what it reads is the rows alone, since each gang reads the base by itself."""
        return self.actors[0]

    def _read_base(self, reader: Any) -> int:
        return 0

    def _attach(self, slot: int) -> Reference:
        found = []
        for rank in self.ranks[slot]:
            tokens = ray.get(rank.find_tokens.remote(self.tokens))
            if tokens is None:
                self.parts = self.parts or put_tokens(self.tokens)
                tokens = ray.get(rank.receive_tokens.remote(self.tokens, self.parts))
            found.append(tokens)
        refuse_shared_gpus([(place.node_id, place.gpu) for place in self._places(slot)])
        address, port = ray.get(self.ranks[slot][0].address.remote())
        leader, *followers = self.ranks[slot]
        for rank, tokens in zip(followers, found[1:], strict=True):
            rank.follow.remote(leader, "form", address, port, tokens)
        return leader.lead.remote("form", address, port, found[0])

    def _places(self, slot: int) -> list[Place]:
        found: list[Place] = ray.get([rank.place.remote() for rank in self.ranks[slot]])
        return found

    def _end(self, slot: int) -> None:
        """What a gang leaves goes with its placement group, when that is made anew."""

    def _restore(self, slot: int) -> None:
        """A gang holds no weights that a rule would have changed; of its memory only the first rank was asked."""
        self._refuse_lost_memory(slot)

    def _started(self, store: Path, shared: str | None, places: list[Place]) -> Start:
        try:
            start = super()._started(store, shared, places)
        except LOST as error:
            raise self._known(error, self.ranks) from error
        assert isinstance(start.initial, Partition)
        self.partition = start.initial
        return replace(start, base_bytes=ray.get(self.actors[0].base_bytes.remote()))

    def initial(self) -> ShardedState:
        """The state before the first round."""
        return self._kept(0, [rank.initial.options(num_returns=2).remote() for rank in self.ranks[0]])

    def serve(self, state: ShardedState, served: Served, sums: list[ShardSum]) -> ShardedState:
        """The next state: each shard in a rank of the first gang, from that shard of all gangs' sums."""
        self.deaths = 0
        while True:
            given = [
                rank.serve.options(num_returns=2).remote(part, state.round, served, *shards)
                for rank, part, *shards in zip(self.ranks[0], state.parts, *[one.parts for one in sums], strict=True)
            ]
            try:
                return self._kept(state.round + 1, given)
            except LOST as error:
                self.replace(0, error)

    def _kept(self, round_: int, given: list[tuple[Reference, Reference]]) -> ShardedState:
        """The state whose shards' bytes and shards are `given`, once all of them are there."""
        nbytes = sum(self.answer([nbytes for nbytes, _ in given]))
        return ShardedState(round_, tuple(part for _, part in given), nbytes)

    def held(self, sums: Sums) -> int:
        """The head: ranks hold the rest."""
        return len(sums.encode_head(1.0))

    def masked_shards(self, slot: int) -> list[Reference]:
        """References to the ranks' shards of a gang's masked vector, once all of them are there."""
        given = [rank.masked_shard.options(num_returns=2).remote() for rank in self.ranks[slot]]
        self.answer([there for there, _ in given])
        return [shard for _, shard in given]

    def unmasked(self, session: Session, total_L: np.ndarray, removals: Masks, shards: list[Any]) -> ShardTotals:
        """What the server learns: each shard of it in a rank of the first gang, the figures here."""
        totals = session.sums.decode_head(total_L)
        while True:
            given = [
                rank.unmask_own.options(num_returns=2).remote(session, removals, *totals, *mine)
                for rank, *mine in zip(self.ranks[0], *shards, strict=True)
            ]
            try:
                figures: dict[str, float] = self.answer(given[0][0])
                self.answer([there for there, _ in given[1:]])
                return ShardTotals(*totals, tuple(part for _, part in given), figures)
            except LOST as error:
                self.replace(0, error)

    def _take_sums(self, slots: list[int]) -> Taken:
        """Each slot's sum, in shards that stay in the store."""
        closing = {slot: self._close(slot) for slot in slots}
        found, lost = dict[int, ShardSum](), dict[int, Exception]()
        for slot, shards in closing.items():
            try:
                nbytes = sum(self.answer([nbytes for nbytes, _ in shards]))
                found[slot] = ShardSum(tuple(shard for _, shard in shards), nbytes)
            except LOST as error:
                lost[slot] = error
        return Taken([*found.values()], sum(one.nbytes for one in found.values()), [*found], lost)

    def _close(self, slot: int) -> list[tuple[Reference, Reference]]:
        return [rank.close_round.options(num_returns=2).remote() for rank in self.ranks[slot]]

    def stop(self) -> None:
        """Ends all gangs."""
        for group in self.groups.values():
            remove_placement_group(group)
