"""The server's half of a strategy: a model state, which is a tuple of shards, and the rule that makes the next one.

A whole vector is one shard, and `DriverShards` holds it in this process. With `RankShards` each rank of the first gang
works on a shard of its own, and the driver knows references. Rules, checkpoints and callbacks never ask which it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from engine.aggregation.ring_encoding import Plan, live_masks, ring_aggregate
from engine.aggregation.server_step import server_step
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.errors import RunError
from engine.messages.shards import Shard, ShardedState, ShardSum, borrow
from engine.messages.tasks import Served
from engine.scheduling.dispatcher import Worked
from engine.scheduling.pool import Pool, Start
from strategies.core.errors import StrategyError
from strategies.core.protocol import Aggregate, Broadcast, ServerState
from strategies.privacy.central import CentralPlan

WITHIN_CALLS = 65_536  # bytes, well below what Ray puts into the store by itself


@dataclass(frozen=True)
class DriverShards:
    """One shard, the whole vector, in this process. `population` is how many clients may be sampled."""

    federation: Federation
    start: Start
    population: int

    def initial(self) -> ShardedState:
        """Returns the state before the first round."""
        assert isinstance(self.start.initial, np.ndarray)
        state = self.federation.strategy.init(borrow(self.start.initial), self.start.layout)
        return ShardedState(0, (self.hold(state),))

    def refuse_other(self, state: ShardedState) -> None:
        """Raises RunError if a state from a checkpoint is of another model."""
        parameters, size = [part.params.numel() for part in state.parts], self.start.layout.size
        if parameters != [size]:
            raise RunError(
                f"the checkpoint holds {' + '.join(map(str, parameters))} parameters, the recipe's model has {size}: "
                f"resume with the recipe that it was written with"
            )

    def read(self, part: ServerState) -> ServerState:
        """Returns the state."""
        return part

    def hold(self, shard: ServerState) -> ServerState:
        """Returns the state with what no checkpoint holds, since it never changes."""
        return replace(shard, layout=self.start.layout, seed=self.federation.seed, population=self.population)

    def trainings(self, state: ShardedState) -> int:
        """Returns how many vectors a client trains in a round: personal models are trained beside the global one."""
        strategy = self.federation.strategy
        return len(strategy.starts(strategy.broadcast(_whole(state)), {}))

    def broadcast(self, state: ShardedState) -> BroadcastMessage:
        """Returns what the clients of the next round start from."""
        return BroadcastMessage.of(self.federation.strategy.broadcast(_whole(state)))

    def vector(self, state: ShardedState) -> Any:
        """Returns a reference to a broadcast of the vector (P,) alone."""
        return ray.put(BroadcastMessage.of(Broadcast(state.round, _whole(state).params)))

    def share(self, broadcast: BroadcastMessage) -> tuple[Any, int]:
        """Returns a reference, or a small broadcast itself, since a look into the store takes longer."""
        return (broadcast if broadcast.nbytes <= WITHIN_CALLS else ray.put(broadcast)), broadcast.nbytes

    def sums(self, worked: Worked) -> tuple[list[Aggregate], int]:
        """Returns the sum over all workers, or the updates one by one where the rule reads each."""
        nbytes, good = 0, sum(report.good for report in worked.reports)
        if self.federation.strategy.reads == "sum":
            (aggregate,) = worked.sums
        else:
            aggregate, nbytes = _each(worked.each)
        assert aggregate.count == good, f"{aggregate.count} updates in the sum, and {good} clients that gave one"
        return [aggregate], nbytes

    def unmasked(self, totals: Any, plan: Plan, round_: int) -> tuple[list[Aggregate], dict[str, float]]:
        """Returns the sums as floats, and the figures by name."""
        aggregate, figures = ring_aggregate(totals, self.federation, self.start.layout, plan, round_)
        return [aggregate], figures

    def step(
        self, state: ShardedState, sums: list[Aggregate], plan: CentralPlan | None, clip: float
    ) -> tuple[ShardedState, float]:
        """Applies the server's step in this process."""
        layout = self.start.layout
        live = {} if plan is None else live_masks(self.federation, layout, state.round)
        aggregate = sums[0] if sums else None
        after, clip = server_step(_whole(state), aggregate, plan, clip, self.federation, layout, live)
        if after.merged_delta is not None and not self.federation.strategy.merges_into_base:
            named = type(self.federation.strategy).__name__
            raise StrategyError(f"{named} changes the base: declare merges_into_base = True in its class")
        return ShardedState(after.round, (after,)), clip

    def merged(self, state: ShardedState) -> torch.Tensor | None:
        """Returns the state's merged delta."""
        return _whole(state).merged_delta


@dataclass(frozen=True)
class RankShards:
    """A shard in each rank of a gang. States and sums lie in the object store; the driver knows references."""

    federation: Federation
    pool: Pool
    population: int

    def initial(self) -> ShardedState:
        """Returns the state before the first round."""
        return self.pool.initial()

    def refuse_other(self, state: ShardedState) -> None:
        """Raises RunError if a state from a checkpoint is of another number of ranks."""
        assert self.pool.partition is not None
        ranks = len(self.pool.partition.parts)
        if len(state.parts) != ranks:
            raise RunError(
                f"the checkpoint does not hold {ranks} shards, as clients.zero.ranks asks: "
                f"resume with the recipe that it was written with"
            )

    def read(self, part: Any) -> ServerState:
        """Returns the shard as it is mapped from the object store."""
        shard: Shard = ray.get(part)
        return shard.state(0, self.federation.seed)

    def hold(self, shard: ServerState) -> Any:
        """Puts a shard into the object store."""
        return ray.put(Shard.of(shard.params, shard.moments))

    def trainings(self, state: ShardedState) -> int:
        """Returns 1: rules with personal models need whole vectors."""
        return 1

    def broadcast(self, state: ShardedState) -> BroadcastMessage:
        """Returns the shards; each rank computes from its own what a client receives."""
        return BroadcastMessage(state.round, state.parts, state.nbytes, self.pool.partition)

    def vector(self, state: ShardedState) -> BroadcastMessage:
        """Returns the shards."""
        return self.broadcast(state)

    def share(self, broadcast: BroadcastMessage) -> tuple[BroadcastMessage, int]:
        """Returns the broadcast: it holds references alone."""
        return broadcast, broadcast.nbytes

    def sums(self, worked: Worked) -> tuple[list[ShardSum], int]:
        """Returns the sum of each worker, in shards."""
        return worked.sums, 0

    def unmasked(self, totals: Any, plan: Plan, round_: int) -> tuple[list[ShardSum], dict[str, float]]:
        """Returns the sums, which the ranks have unmasked, and the figures."""
        return [ShardSum(totals.parts, 0)], totals.figures

    def step(
        self, state: ShardedState, sums: list[ShardSum], plan: CentralPlan | None, clip: float
    ) -> tuple[ShardedState, float]:
        """Lets the ranks of the first gang apply the server's step, each to its shard."""
        return self.pool.serve(state, Served(self.population, plan, clip), sums), clip

    def merged(self, state: ShardedState) -> None:
        """Returns None: gangs refuse rules that merge into the base."""


Shards = DriverShards | RankShards


@dataclass(frozen=True)
class Server:
    """The server of a federation: its state, what clients receive of it, and what becomes of their sums."""

    shards: Shards
    pool: Pool

    def broadcast(self, state: ShardedState) -> Any:
        """Returns what the clients of the next round start from."""
        return self.shards.broadcast(state)

    def vector(self, state: ShardedState) -> Any:
        """Returns the model as workers take it, to evaluate it, to generate with it, or to export it."""
        return self.shards.vector(state)

    def apply(
        self, state: ShardedState, sums: list[Any], plan: CentralPlan | None, clip: float
    ) -> tuple[ShardedState, float]:
        """Returns the next state and the next clipping norm; without `sums` the same model one round later.

        With a `plan` the sums get its noise first, or noise is all that moves the model; then what clients did to their
        updates is undone in reverse, and the rule is applied. The workers' base follows a rule that merges into it.
        """
        if not sums and plan is None:  # nobody took part, as in an empty Poisson cohort
            return replace(state, round=state.round + 1), clip
        after, clip = self.shards.step(state, sums, plan, clip)
        self.move_base(state, after)
        return after, clip

    def move_base(self, before: ShardedState | None, after: ShardedState | None) -> None:
        """Gives all workers the base with what state `after` has merged into it, in place of that of `before`.

        None stands for the base of the recipe.
        """
        old, new = (None if state is None else self.shards.merged(state) for state in (before, after))
        if new is not old:
            self.pool.rebase(None if new is None else new.numpy())


def _whole(state: ShardedState) -> ServerState:
    """The state of its one shard."""
    (shard,) = state.parts
    whole: ServerState = replace(shard, round=state.round)
    return whole


def _each(references: Mapping[int, Any]) -> tuple[Aggregate, int]:
    """Returns the updates one by one in the order of clients, mapped from the object store, and their bytes."""
    messages = {client: ray.get(references[client]) for client in sorted(references)}
    assert all(message is None or message.client == client for client, message in messages.items())
    updates = tuple(message.update() for message in messages.values() if message is not None)
    nothing, weight = torch.zeros_like(updates[0].delta), sum(update.weight for update in updates)
    nbytes = sum(vector.nbytes for update in updates for vector in (update.delta, *update.extras.values()))
    return Aggregate(weight, nothing, {}, len(updates), updates), nbytes
