"""Ranks: processes that together are one slot, a gang, with one DeepSpeed engine for the gang's life.

The driver talks to the first rank as it talks to a ClientActor, and asks the others to do the same at the same time
with their own shards, which it never sees. A rank's death or silence ends its gang: collectives fail, or run into
their timeout, and the pool makes a new one. Legend: P parameters, S of a rank's shard.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import ObjectLostError

from datasets_partition.store.tokens import Tokens
from engine.aggregation.exact_sum import ExactSum, PartialSum, merge
from engine.aggregation.ring_encoding import live_masks
from engine.aggregation.server_step import server_step
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.reports import Report
from engine.messages.shards import AggregateShard, Shard, borrow
from engine.messages.tasks import Served, Unit
from engine.models.base_model import load_tokenizer
from engine.models.export import Sharded, sharded_files
from engine.records.client_state import RANK, ClientStates
from engine.system import allocator as heap
from engine.system.failures import LOST, GangLost, ShardLost, last_line
from engine.system.rendezvous import meet
from engine.training.evaluation import ClientLoss
from engine.training.generation import Prompt
from engine.workers.client_runner import ClientRunner
from engine.workers.evaluator import Evaluator
from engine.workers.peers import Peers
from engine.workers.process import WorkerProcess
from engine.workers.secure_training import SecureTraining
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState
from strategies.core.seeds import torch_seed
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.messages import Inbox, MaskedSum
from strategies.secagg.protocol import Session

if TYPE_CHECKING:
    from engine.training.deepspeed_training import ZeroTrainer


@dataclass(frozen=True)
class Formed:
    """What a rank has once its gang has met."""

    trainer: "ZeroTrainer"
    tokenizer: Any
    runner: ClientRunner
    evaluator: Evaluator
    secure: SecureTraining


class Rank(WorkerProcess):
    """One process of a gang."""

    def __init__(self, federation: Federation, folder: Path, rank: int) -> None:
        super().__init__(federation, folder)
        assert federation.clients.zero is not None
        self.zero, self.rank = federation.clients.zero, rank
        self.sum = ExactSum()
        self.masked_S = np.empty(0, np.uint32)  # after the head
        self.failure: GangLost | None = None
        self.socket: socket.socket | None = None
        self._formed: Formed | None = None

    @property
    def formed(self) -> Formed:
        """What `form` has made."""
        assert self._formed is not None
        return self._formed

    def form(self, address: str, port: int, tokens: Path) -> tuple[Layout, Partition]:
        """Meets the other ranks at the first one's address and makes the model and its engine with them."""
        federation, zero = self.federation, self.zero
        if not dist.is_initialized():
            gpu = self.device.type == "cuda"
            meet(self.rank, zero.ranks, address, port, self.socket, timeout_s=zero.timeout_s, gpu=gpu)
        # Deepspeed chooses its accelerator when it is imported, and takes seconds for it.
        from engine.models.deepspeed_model import zero_model
        from engine.training.deepspeed_training import ZeroTrainer

        tokenizer = load_tokenizer(federation.model)
        assert isinstance(tokenizer.pad_token_id, int)
        heap.give_back()
        network = zero_model(federation.model, zero, torch_seed(federation.seed, 0, -1, "initial"), self.rank)
        trainer = ZeroTrainer(network, tokenizer.pad_token_id, federation.model, zero, federation.train)
        heap.keep(gathered=zero.stage == 3)
        peers = Peers(self.rank, trainer.summed, partial(_largest, trainer.works_on, zero.ranks))
        states = ClientStates(self.folder / f"{RANK}{self.rank}")
        runner = ClientRunner(
            federation, Tokens.open(tokens), states, lambda unit, message: trainer, trainer.layout, peers
        )
        evaluator = Evaluator(runner, trainer, trainer.become)
        secure = SecureTraining(runner, trainer.layout, trainer.partition)
        self._formed = Formed(trainer, tokenizer, runner, evaluator, secure)
        return trainer.layout, trainer.partition

    def base_bytes(self) -> int:
        """Returns the size of the base's weights, of all ranks together."""
        return self.formed.trainer.nbytes

    def initial(self) -> tuple[int, Shard]:
        """Returns the bytes of the state's shard before the first round, and the shard, which stays in the store."""
        trainer = self.formed.trainer
        return _stored(self.federation.strategy.init(trainer.weights().cpu(), trainer.layout))

    def serve(self, shard: Shard, round_: int, served: Served, *sums: PartialSum | AggregateShard) -> tuple[int, Shard]:
        """The server's part of a round for one shard: the sum over all slots, noise, then the rule; as `initial`."""
        state = shard.state(round_, self.federation.seed, served.population)
        trainer, layout = self.formed.trainer, Layout(("shard",), ((len(shard.params),),))
        masks = live_masks(self.federation, trainer.layout, round_).items() if served.plan is not None else ()
        live = {name: trainer.partition.cut(mask, self.rank) for name, mask in masks}
        plan, clip = served.plan, served.clip
        state, _ = server_step(state, aggregate_of(sums), plan, clip, self.federation, layout, live, self.rank)
        return _stored(state)

    def run(self, chunk: list[Unit], message: BroadcastMessage) -> list[Report]:
        """Trains clients one after another, and adds this rank's shards of their updates up."""
        return self.formed.runner.run(chunk, message, self.sum)

    def close_round(self) -> tuple[int, PartialSum]:
        """Returns the bytes of this rank's shard of the sum since the last close, and the shard for the store."""
        partial = self.sum.take()
        return partial.nbytes, partial

    def masked(self, inboxes: dict[int, Inbox], message: BroadcastMessage) -> tuple[list[Report], MaskedSum] | None:
        """Third trip: trains, keeps the masked shard. The first rank says who is left, and answers with the head."""
        secure, leads = self.formed.secure, self.rank == 0
        reports = secure.train(_from_first(self.secure.pending(inboxes) if leads else None), message)
        masks: list[Masks] = _from_first(self.secure.masks(reports, inboxes) if leads else None)
        masked, head = secure.masked(masks), secure.head
        self.masked_S = masked[head:]
        return self.secure.answer(masked[:head]) if leads else None

    def masked_shard(self) -> tuple[bool, np.ndarray]:
        """Returns that the masked shard is there, and the shard for the store."""
        return True, self.masked_S

    def unmask_shard(
        self, session: Session, removals: Masks, count: int, weight: float, *masked: np.ndarray
    ) -> tuple[dict[str, float], AggregateShard]:
        """The server's part for this rank's shard of all slots' masked vectors: figures, and the sums for the store."""
        return self.formed.secure.shard(session).unmasked(list(masked), removals, count, weight)

    def evaluate(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """See Evaluator.losses; losses are of all ranks together."""
        return self.formed.evaluator.losses(chunk, message, limit)

    def generate(self, message: BroadcastMessage, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns greedy continuations, one for each prompt, the same in all ranks."""
        self.formed.evaluator.become(message.vector(self.rank))
        return self.formed.trainer.generate(self.formed.tokenizer, prompts, tokens)

    def follow(self, leader: Any, method: str, *arguments: Any) -> None:
        """Does what the first rank does at the same time; any error but the user's ends the first rank too.

        It may be stopped, or wait for this rank in a collective, and then nobody else would tell the pool.
        """
        try:
            getattr(self, method)(*arguments)
        except Exception as error:
            if self.failure is None:  # whatever comes after it fails because the first rank has ended
                self.failure = _lost(error, method)
            if _is_users(error, method):
                raise
            ray.kill(leader)
            raise _lost(error, method) from None

    def why(self) -> GangLost | None:
        """Returns what made this rank fail first, if it did."""
        return self.failure


class Gang(Rank):
    """The first rank, which speaks for all where the driver asks for something that is not in shards."""

    def address(self) -> tuple[str, int]:
        """Returns where the ranks meet: the first one listens there, and on this address alone."""
        address = ray.util.get_node_ip_address()
        self.socket = socket.create_server((address, 0))
        return address, self.socket.getsockname()[1]

    def export(self, message: BroadcastMessage, card: str) -> Iterator[tuple[str, bytes]]:
        """Yields the files of the model folder, one after another; the shards stay mapped from the object store."""
        trainer, shards = self.formed.trainer, [borrow(shard.params) for shard in ray.get(list(message.shards))]
        vector = Sharded(trainer.layout, partial(trainer.partition.read, shards))
        yield from sharded_files(trainer.network, vector, self.federation.model, self.formed.tokenizer, card)

    def lead(self, method: str, *arguments: Any) -> Any:
        """Returns what the first rank answers when all ranks do the same; GangLost when one of them cannot."""
        try:
            return getattr(self, method)(*arguments)
        except LOST:
            raise
        except Exception as error:
            if _is_users(error, method):
                raise
            raise _lost(error, method) from None


def aggregate_of(sums: tuple[PartialSum | AggregateShard, ...]) -> Aggregate | None:
    """Returns a shard of the sum over all slots: exact parts, or one that is unmasked already; None of nobody."""
    parts = [entry for entry in sums if isinstance(entry, PartialSum)]
    unmasked = [entry for entry in sums if isinstance(entry, AggregateShard)]
    return unmasked[0].aggregate() if unmasked else merge(parts) if parts else None


def _stored(state: ServerState) -> tuple[int, Shard]:
    shard = Shard.of(state.params, state.moments)
    return shard.nbytes, shard


def _largest(device: torch.device, ranks: int, value: float) -> float:
    """Returns the largest value of all ranks, NaN if one has NaN."""
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine)
    return torch.cat(gathered).max().item()


def _from_first(value: Any) -> Any:
    """Returns what the first rank has given as `value`, in all ranks."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _lost(error: Exception, method: str) -> GangLost:
    """Returns what ends a gang in which a rank raised `error`.

    What a client raises may quote its rows, and under secure aggregation nobody else reads that.
    """
    kind = ShardLost if isinstance(error, ObjectLostError) else GangLost
    text = "" if method == "masked" else f": {last_line(error)}"
    return kind(f"a rank of a gang failed: {type(error).__name__}{text}")


def _is_users(error: Exception, method: str) -> bool:
    """Whether the user can mend it, and all ranks meet it; what a client raises ends its gang, as it would a slot."""
    return hasattr(error, "exit_code") and method not in ("run", "masked")
