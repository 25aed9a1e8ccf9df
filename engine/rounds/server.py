"""The server: adds up what clients send, and applies the rule to a model state, which is a tuple of shards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from engine.aggregation.ring_encoding import ring_aggregate, sent_masks_of
from engine.aggregation.server_step import server_step
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.errors import RunError
from engine.messages.shards import Shard, ShardedState, borrow
from engine.models.start import adapter_start, begun
from engine.scheduling.dispatcher import Worked
from engine.scheduling.pool import Pool
from engine.scheduling.worker_kinds import Reference
from engine.system.failures import LOST
from strategies.core.errors import StrategyError
from strategies.core.protocol import Aggregate, Broadcast, ServerState
from strategies.privacy.central import CentralPlan
from strategies.privacy.checks import NoisePlan
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums

# A session, its sum (L,) from the slots' messages, the masks that it still holds, what ranks hold beside each message.
MaskedTotal = tuple[Session, np.ndarray, Masks, list[Any]]
# What the server learns of it: the number of clients, their weight, the sums as the rule reads them, figures by name.
UnmaskedSums = tuple[int, float, list[Any], dict[str, float]]
Next = tuple[ShardedState, float]  # the state and the clipping norm after a round


@dataclass(frozen=True)
class DriverServer:
    """The server in this process: one shard, the whole vector.

    `population` is how many clients may be sampled, `reference` the vector of the objective's reference model, if it
    has one, in the object store, and `row_column` what that says of all rows, if it is stored.
    """

    federation: Federation
    pool: Pool
    population: int
    reference: tuple[Reference, ...] = ()
    row_column: tuple[Reference, ...] = ()

    def initial(self, *, of_base: bool = False) -> ShardedState:
        """Returns the state before the first round, or the base's own, which `model.start` does not change."""
        assert self.pool.initial is not None
        start = None if of_base else adapter_start(self.federation.model, self.pool.layout)
        vector = begun(start, borrow(self.pool.initial))
        state = self.federation.strategy.init(vector, self.pool.layout)
        return ShardedState(0, (self.hold(state),))

    def refuse_other(self, state: ShardedState) -> None:
        """Raises RunError if a state from a checkpoint is of another model."""
        parameters, size = [shard.params.size for shard in state.shards], self.pool.layout.size
        if parameters != [size]:
            raise RunError(
                f"the checkpoint holds {' + '.join(map(str, parameters))} parameters, the recipe's model has {size}: "
                f"resume with the recipe that it was written with"
            )

    def read(self, shard: Shard) -> ServerState:
        """Returns the tensors of a shard."""
        return shard.state(0, self.federation.seed)

    def hold(self, shard: ServerState) -> Shard:
        """Returns a shard as the state keeps it."""
        return Shard.of(shard.params, shard.moments, shard.merged_delta)

    def stored(self, state: ShardedState) -> tuple[Reference, ...]:
        """Puts the vector of a state into the object store."""
        shard: Shard = state.shards[0]
        return (ray.put(Shard(shard.params, {})),)

    def trainings(self, state: ShardedState) -> int:
        """Returns how many vectors a client trains in a round: personal models are trained beside the global one."""
        strategy = self.federation.strategy
        return len(strategy.starts(strategy.broadcast(self._server_state(state)), {}))

    def broadcast_message(self, state: ShardedState) -> BroadcastMessage:
        """Returns what the clients of the next round start from."""
        return self.message_of(self.federation.strategy.broadcast(self._server_state(state)))

    def model_message(self, state: ShardedState) -> BroadcastMessage:
        """Returns the model as workers take it, to evaluate it, to generate with it, or to export it."""
        return self.message_of(Broadcast(state.round, self._server_state(state).params))

    def message_of(self, broadcast: Broadcast) -> BroadcastMessage:
        """Returns a broadcast as it crosses Ray."""
        return replace(BroadcastMessage.of(broadcast), reference=self.reference, row_column=self.row_column)

    def sums(self, worked: Worked) -> tuple[list[Aggregate], int]:
        """Returns the sum over all workers, or the updates one by one where the rule reads each, and their bytes."""
        good, reads = sum(report.good for report in worked.reports), self.federation.strategy.reads
        aggregate, nbytes = (worked.sums[0], 0) if reads == "sum" else _each(worked.each)
        assert aggregate.count == good, f"{aggregate.count} updates in the sum, and {good} clients that gave one"
        return [aggregate], nbytes

    def held(self, sums: Sums) -> int:
        """Returns how many coordinates of a masked vector come in a slot's message: all."""
        return sums.length

    def masked_shards(self, slot: int) -> Any:
        """Returns references to what of a slot's masked vector is not in its message: nothing."""
        return None

    def unmasked(self, masked: MaskedTotal, plan: NoisePlan | None) -> UnmaskedSums:
        """Returns the sums as floats, and the figures; messages come without masks."""
        session, total_L, _, _ = masked
        totals = session.sums.decode(total_L)
        aggregate, figures = ring_aggregate(totals, self.federation, self.pool.layout, plan, session.round)
        return totals.count, totals.weight, [aggregate], figures

    def step(self, state: ShardedState, sums: list[Aggregate], plan: CentralPlan | None, clip: float) -> Next:
        """Applies the server's step in this process."""
        layout = self.pool.layout
        sent_masks = {} if plan is None else sent_masks_of(self.federation, layout, state.round)
        aggregate = sums[0] if sums else None
        after, clip = server_step(self._server_state(state), aggregate, plan, clip, self.federation, layout, sent_masks)
        if after.merged_delta is not None and not self.federation.strategy.merges_into_base:
            name = type(self.federation.strategy).__name__
            raise StrategyError(f"{name} changes the base: declare merges_into_base = True in its class")
        return ShardedState(after.round, (self.hold(after),)), clip

    def merged_delta(self, state: ShardedState) -> np.ndarray | None:
        """Returns what the rule has added to the base's weights: see ServerState."""
        shard: Shard = state.shards[0]
        return shard.merged_delta

    def _server_state(self, state: ShardedState) -> ServerState:
        shard: Shard = state.shards[0]
        return replace(shard.state(state.round, self.federation.seed, self.population), layout=self.pool.layout)


@dataclass(frozen=True)
class RankServer:
    """The server in the ranks of the first gang: a shard in each. States and sums lie in the object store."""

    federation: Federation
    pool: Pool
    population: int
    reference: tuple[Reference, ...] = ()
    row_column: tuple[Reference, ...] = ()

    def initial(self, *, of_base: bool = False) -> ShardedState:
        """Returns the state before the first round, or the base's own, which `model.start` does not change."""
        assert self.pool.partition is not None
        model, layout, intervals = self.federation.model, self.pool.layout, self.pool.partition.intervals
        starts = [None if of_base else adapter_start(model, layout, each) for each in intervals]
        ranks = zip(self.pool.ranks(0), starts, strict=True)
        return self._kept(0, [rank.initial.options(num_returns=2).remote(start) for rank, start in ranks])

    def refuse_other(self, state: ShardedState) -> None:
        """Raises RunError if a state from a checkpoint is of another number of ranks."""
        ranks = len(self.pool.ranks(0))
        if len(state.shards) != ranks:
            raise RunError(
                f"the checkpoint does not hold {ranks} shards, as clients.zero.ranks asks: "
                f"resume with the recipe that it was written with"
            )

    def read(self, shard: Any) -> ServerState:
        """Returns a shard as it is mapped from the object store."""
        return Shard.state(ray.get(shard), 0, self.federation.seed)

    def hold(self, shard: ServerState) -> Reference:
        """Puts a shard into the object store."""
        return ray.put(Shard.of(shard.params, shard.moments))

    def stored(self, state: ShardedState) -> tuple[Reference, ...]:
        """Returns the shards, which lie in the object store already."""
        return state.shards

    def trainings(self, state: ShardedState) -> int:
        """Returns 1: rules with personal models need whole vectors."""
        return 1

    def broadcast_message(self, state: ShardedState) -> BroadcastMessage:
        """Returns the shards; each rank computes from its own what a client receives."""
        partition, beside = self.pool.partition, (self.reference, self.row_column)
        return BroadcastMessage(state.round, state.shards, state.nbytes, partition, *beside)

    model_message = broadcast_message

    def sums(self, worked: Worked) -> tuple[list[tuple[Reference, ...]], int]:
        """Returns the sum of each worker, in shards."""
        return worked.sums, 0

    def held(self, sums: Sums) -> int:
        """Returns the number of coordinates of the head: ranks hold the rest."""
        return len(sums.encode_head(1.0))

    def masked_shards(self, slot: int) -> list[Reference]:
        """Returns references to the ranks' shards of a slot's masked vector, once all of them are there."""
        shards = [rank.masked_shard.options(num_returns=2).remote() for rank in self.pool.ranks(slot)]
        self.pool.answer([there for there, _ in shards])
        return [shard for _, shard in shards]

    def unmasked(self, masked: MaskedTotal, plan: NoisePlan | None) -> UnmaskedSums:
        """Lets the ranks of the first gang unmask their shards, which stay in the store; returns the figures."""
        session, total_L, removals, shards_by_slot = masked
        totals = session.sums.decode_head(total_L)
        while True:
            unmasked = [
                rank.unmask_shard.options(num_returns=2).remote(session, removals, *totals, *shards)
                for rank, *shards in zip(self.pool.ranks(0), *shards_by_slot, strict=True)
            ]
            try:
                figures: dict[str, float] = self.pool.answer(unmasked[0][0])
                self.pool.answer([there for there, _ in unmasked[1:]])
                return *totals, [tuple(shard for _, shard in unmasked)], figures
            except LOST as error:
                self.pool.replace(0, error)

    def step(self, state: ShardedState, sums: list[Any], plan: CentralPlan | None, clip: float) -> Next:
        """Lets the ranks of the first gang apply the server's step, each to its shard of the state and of all sums."""
        rest = (state.round, self.population, plan, clip)

        def serve(_: Any) -> ShardedState:
            shards = zip(self.pool.ranks(0), state.shards, *sums, strict=True)
            after = [rank.serve.options(num_returns=2).remote(shard, *rest, *each) for rank, shard, *each in shards]
            return self._kept(state.round + 1, after)

        return self.pool.retried(serve), clip

    def merged_delta(self, state: ShardedState) -> None:
        """Returns None: gangs refuse rules that merge into the base."""

    def _kept(self, round_: int, shards: list[tuple[Reference, Reference]]) -> ShardedState:
        """Returns the state of these shards, given as references to bytes and shard, once all of them are there."""
        nbytes = sum(self.pool.answer([nbytes for nbytes, _ in shards]))
        return ShardedState(round_, tuple(shard for _, shard in shards), nbytes)


Server = DriverServer | RankServer


def with_reference(server: Server, initial: ShardedState) -> Server:
    """Returns the server with the vector of the reference model, where it is more than the model without adapters."""
    kind, model = server.federation.train.objective.reference, server.federation.model
    if kind == "none" or (kind == "base" and model.peft.off_is_base):
        return server
    of_base = kind == "base" and model.start is not None
    return replace(server, reference=server.stored(server.initial(of_base=True) if of_base else initial))


def apply(server: Server, state: ShardedState, sums: list[Any], plan: CentralPlan | None, clip: float) -> Next:
    """Returns the next state and the next clipping norm; without `sums` the same model one round later.

    With a `plan` the sums get its noise first, or noise is all that moves the model; then what clients did to their
    updates is undone in reverse, and the rule is applied. The workers' base follows a rule that merges into it.
    """
    if not sums and plan is None:  # nobody took part, as in an empty Poisson cohort
        return replace(state, round=state.round + 1), clip
    after, clip = server.step(state, sums, plan, clip)
    merge_into_base(server, state, after)
    return after, clip


def merge_into_base(server: Server, before: ShardedState | None, after: ShardedState | None) -> None:
    """Gives workers the base with what `after` has merged into it in place of `before`; None is the recipe's base."""
    old, new = (None if state is None else server.merged_delta(state) for state in (before, after))
    unchanged = old is new if old is None or new is None else np.may_share_memory(old, new)
    if not unchanged:
        server.pool.merge_into_base(new)


def _each(references: Mapping[int, Any]) -> tuple[Aggregate, int]:
    """Returns the updates one by one in the order of clients, mapped from the object store, and their bytes."""
    messages = {client: ray.get(references[client]) for client in sorted(references)}
    assert all(message is None or message.client == client for client, message in messages.items())
    updates = tuple(message.update() for message in messages.values() if message is not None)
    nothing, weight = torch.zeros_like(updates[0].delta), sum(update.weight for update in updates)
    nbytes = sum(vector.nbytes for update in updates for vector in (update.delta, *update.extras.values()))
    return Aggregate(weight, nothing, {}, len(updates), updates), nbytes
