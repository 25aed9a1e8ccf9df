"""The server's half of a strategy: on a state in the driver, or on shards of it in the gangs' ranks."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import ray

from engine.aggregation.privacy_account import noisy
from engine.aggregation.ring_encoding import live_masks
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.shards import ShardedState, ShardSum, borrow
from engine.messages.tasks import Served
from engine.scheduling.pool import Pool, Start
from strategies.core.protocol import Aggregate, Broadcast, ServerState
from strategies.privacy.central import CentralPlan
from strategies.transforms.chain import decode


class Server(Protocol):
    """What the driver does with a state that it does not look into."""

    def initial(self) -> Any:
        """The state before the first round."""
        ...

    def loaded(self, state: Any) -> Any:
        """A state from a checkpoint; ValueError where it is of another model."""
        ...

    def broadcast(self, state: Any) -> Any:
        """What the clients of the next round start from."""
        ...

    def sent(self, state: Any) -> Any:
        """The state's vector as slots take it, to judge it, to write by it, or to export it."""
        ...

    def apply(self, state: Any, aggregate: Any, plan: CentralPlan | None, clip: float) -> tuple[Any, float]:
        """The next state, and the next clipping norm; without an aggregate the same model one round later.

        With a `plan` the sums get its noise first; then what clients did to their updates is undone in reverse.
        """
        ...


@dataclass(frozen=True)
class WholeServer:
    """The state is in the driver."""

    federation: Federation
    slots: Pool
    start: Start
    population: int

    def initial(self) -> ServerState:
        """The state before the first round."""
        assert isinstance(self.start.initial, np.ndarray)
        return self._known(self.federation.strategy.init(borrow(self.start.initial), self.start.layout))

    def loaded(self, state: ServerState | ShardedState) -> ServerState:
        """A state from a checkpoint; ValueError where it is of another model."""
        size, found = self.start.layout.size, len(state.params) if isinstance(state, ServerState) else "shards of"
        if not isinstance(state, ServerState) or found != size:
            raise ValueError(f"the checkpoint holds {found} parameters, the recipe's model has {size}")
        return self._known(state)

    def broadcast(self, state: ServerState) -> BroadcastMessage:
        """What the clients of the next round start from."""
        return BroadcastMessage.of(self.federation.strategy.broadcast(state))

    def sent(self, state: ServerState) -> Any:
        """A reference to the vector (P,)."""
        return ray.put(BroadcastMessage.of(Broadcast(state.round, state.params)))

    def apply(
        self, state: ServerState, aggregate: Aggregate | None, plan: CentralPlan | None, clip: float
    ) -> tuple[ServerState, float]:
        """As the protocol says; the slots' base follows where the rule has merged something into it."""
        if plan is not None:
            live = live_masks(self.federation, state.layout, state.round)
            aggregate, clip = noisy(aggregate, plan, clip, self.federation, state.layout, state.round, live)
        if aggregate is None:  # nobody took part, as in an empty Poisson cohort: nobody moves the model
            return replace(state, round=state.round + 1), clip
        aggregate, state = decode(self.federation.transforms, aggregate, state)
        after = self.federation.strategy.apply(state, aggregate)
        if after.residual is not state.residual:
            self.slots.rebase(None if after.residual is None else after.residual.numpy())
        return after, clip

    def _known(self, state: ServerState) -> ServerState:
        """The state with what no checkpoint holds, since it never changes."""
        return replace(state, layout=self.start.layout, seed=self.federation.seed, population=self.population)


@dataclass(frozen=True)
class ShardServer:
    """The state is in the object store, in shards; the driver knows references to them."""

    slots: Pool
    population: int

    def initial(self) -> ShardedState:
        """The state before the first round."""
        return self.slots.initial()

    def loaded(self, state: ServerState | ShardedState) -> ShardedState:
        """A state from a checkpoint; ValueError where it is of another model."""
        assert self.slots.partition is not None
        ranks = len(self.slots.partition.parts)
        if not isinstance(state, ShardedState) or len(state.parts) != ranks:
            raise ValueError(
                f"the checkpoint does not hold {ranks} shards, as clients.zero.ranks asks: "
                f"resume with the recipe that it was written with"
            )
        return state

    def broadcast(self, state: ShardedState) -> BroadcastMessage:
        """The shards; each rank makes of its own what a client receives."""
        return BroadcastMessage(state.round, state.parts, state.nbytes, self.slots.partition)

    def sent(self, state: ShardedState) -> BroadcastMessage:
        """The shards."""
        return self.broadcast(state)

    def apply(
        self, state: ShardedState, aggregate: list[ShardSum] | None, plan: CentralPlan | None, clip: float
    ) -> tuple[ShardedState, float]:
        """As the protocol says, each shard in a rank; `aggregate` is each slot's sum, in shards."""
        if aggregate is None and plan is None:
            return replace(state, round=state.round + 1), clip
        return self.slots.serve(state, Served(self.population, plan, clip), aggregate or []), clip
