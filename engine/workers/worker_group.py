"""Ranks: processes that together are one slot, a gang, with one DeepSpeed engine for the gang's life.

All ranks do the same at the same time, each with its own shard. A rank's death or silence ends its gang: collectives
fail, or run into their timeout, and the pool makes a new one. Legend: P parameters, S of a rank's shard.
"""

import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import ObjectLostError

from engine.aggregation.exact_sum import PartialSum, merge
from engine.aggregation.ring_encoding import sent_masks_of
from engine.aggregation.server_step import server_step
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.shards import AggregateShard, Shard, borrow
from engine.models.adapters import refuse_other_adapters
from engine.models.export import sharded_files
from engine.models.frozen import map_frozen, read_frozen
from engine.models.start import begun
from engine.models.tokenizer import load_tokenizer, padding
from engine.system import allocator as heap
from engine.system.failures import LOST, GangLost, ShardLost, last_line
from engine.system.rendezvous import meet
from engine.workers.client_runner import Peers
from engine.workers.process import Attached, WorkerProcess, delegate
from strategies.core.layout import Layout
from strategies.core.protocol import ServerState
from strategies.core.seeds import torch_seed
from strategies.core.sharding import Partition
from strategies.privacy.central import CentralPlan


class Rank(WorkerProcess):
    """One process of a gang."""

    masked_shard = delegate(lambda process: process.attached.secure.masked_shard)
    unmask_shard = delegate(lambda process: process.attached.secure.unmask_shard)

    def __init__(self, federation: Federation, folder: Path, rank: int) -> None:
        super().__init__(federation, folder)
        assert federation.clients.zero is not None
        self.zero, self.rank = federation.clients.zero, rank
        self.failure: GangLost | None = None  # what made this rank fail first
        self.listening: socket.socket | None = None  # where the ranks are to meet, in the first one

    def form(self, address: str, port: int, tokens: Path) -> tuple[Layout, Partition]:
        """Meets the other ranks at the first one's address and makes the model and its engine with them."""
        federation, zero, model = self.federation, self.zero, self.federation.model
        if not dist.is_initialized():
            gpu = self.device.type == "cuda"
            meet(self.rank, zero.ranks, address, port, self.listening, timeout_s=zero.timeout_s, gpu=gpu)
        # Deepspeed chooses its accelerator when it is imported, and takes seconds for it.
        from engine.models.deepspeed_model import zero_model
        from engine.training.deepspeed_training import ZeroTrainer

        tokenizer = load_tokenizer(model)
        heap.give_back()
        seed = torch_seed(federation.seed, 0, -1, "initial")
        network = zero_model(model, zero, seed, self.rank, scores=federation.scores)
        refuse_other_adapters(network, federation)
        models = [
            map_frozen(frozen, packed, torch.from_numpy(buffer).to(self.device), model)
            for frozen in federation.train.objective.models
            for packed, buffer in [read_frozen(frozen, model)]
        ]
        trainer = ZeroTrainer(network, padding(tokenizer, network), model, zero, federation.train, models)
        heap.keep(gathered=zero.stage == 3)
        largest = partial(_largest, trainer.works_on, zero.ranks)
        peers = Peers(self.rank, trainer.partition, trainer.summed, largest, _from_first)
        self.attached = Attached(self, tokens, trainer, tokenizer, lambda *_: trainer, trainer.layout, peers)
        return trainer.layout, trainer.partition

    def base_bytes(self) -> int:
        """Returns the size of the base's weights, of all ranks together."""
        return int(self.attached.trainer.nbytes)

    def initial(self, start: torch.Tensor | None = None) -> tuple[int, Shard]:
        """Returns the bytes of the state's shard before the first round, and the shard, which stays in the store.

        `start` (S,) is what the recipe names to begin from, in place of the model's own weights: see `begun`.
        """
        trainer = self.attached.trainer
        weights = begun(start, trainer.weights().cpu())
        return _stored(self.federation.strategy.init(weights, trainer.layout))

    def serve(
        self, shard: Shard, round_: int, population: int, plan: CentralPlan | None, clip: float, *sums: Any
    ) -> tuple[int, Shard]:
        """Does the server's part of a round for one shard: sums the slots' `sums` up, adds noise, applies the rule."""
        state = shard.state(round_, self.federation.seed, population)
        trainer, layout = self.attached.trainer, Layout(("shard",), ((len(shard.params),),))
        masks = sent_masks_of(self.federation, trainer.layout, round_).items() if plan is not None else ()
        sent_masks = {name: trainer.partition.cut(mask, self.rank) for name, mask in masks}
        unmasked = sums and isinstance(sums[0], AggregateShard)  # secure aggregation gives one sum, over all slots
        aggregate = sums[0].aggregate() if unmasked else merge([*sums]) if sums else None
        state, _ = server_step(state, aggregate, plan, clip, self.federation, layout, sent_masks, self.rank)
        return _stored(state)

    def close_round(self) -> tuple[int, PartialSum]:
        """Returns the bytes of this rank's shard of the sum since the last close, and the shard for the store."""
        partial = self.sum.take()
        return partial.nbytes, partial

    def follow(self, leader: Any, method: str, *arguments: Any) -> None:
        """Does what the first rank does, and ends it with any error but the user's: it may wait in a collective."""
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
        self.listening = socket.create_server((address, 0))
        return address, self.listening.getsockname()[1]

    def export(self, message: BroadcastMessage, card: str) -> Iterator[tuple[str, bytes]]:
        """Yields the files of the model folder, one after another; the shards stay mapped from the object store."""
        trainer, shards = self.attached.trainer, [borrow(shard.params) for shard in ray.get(list(message.shards))]
        read, model, tokenizer = partial(trainer.partition.read, shards), self.federation.model, self.attached.tokenizer
        yield from sharded_files(trainer.network, trainer.layout, read, model, tokenizer, card)

    def lead(self, method: str, *arguments: Any) -> Any:
        """Returns what the first rank answers when all ranks do the same; GangLost when one of them cannot."""
        try:
            return getattr(self, method)(*arguments)
        except Exception as error:
            if isinstance(error, LOST) or _is_users(error, method):
                raise
            raise _lost(error, method) from None


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
    """Returns what ends a gang in which a rank raised `error`, without words that may quote a secured client's rows."""
    kind = ShardLost if isinstance(error, ObjectLostError) else GangLost
    text = "" if method == "masked" else f": {last_line(error)}"
    return kind(f"a rank of a gang failed: {type(error).__name__}{text}")


def _is_users(error: Exception, method: str) -> bool:
    """Whether the user can mend it, and all ranks meet it; what a client raises ends its gang, as it would a slot."""
    return hasattr(error, "exit_code") and method not in ("run", "masked")
