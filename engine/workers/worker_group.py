"""A gang: ranks that are one slot together, in one placement group, with one DeepSpeed engine for the gang's life.

The driver talks to the first rank as it talks to a ClientActor; that rank lets the others do the same with their own
shards, which it never sees. What follows from one rank's death or silence is the gang's end: collectives fail, or run
into their timeout, and the pool makes a new gang.
"""

import math
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import ObjectLostError

from datasets_partition.store.tokens import Tokens
from engine.aggregation.exact_sum import LIMIT, ExactSum, NonFiniteUpdate, PartialSum, finite_bound
from engine.aggregation.ring_encoding import live_masks
from engine.aggregation.server_step import noisy
from engine.config.federation import Federation
from engine.messages.tasks import Place, Unit
from engine.messages.wire import (
    DOWN,
    UP,
    Report,
    Sent,
    WireAggregate,
    WireState,
    borrow,
    state_from_wire,
    state_to_wire,
)
from engine.models.base_model import always_the_same_bits, load_tokenizer
from engine.models.export import Sharded, sharded_files
from engine.records.client_state import RANK, ClientMemory, refuse_unseen
from engine.system import allocator as heap
from engine.system.failures import LOST, GangLost, ShardLost, last_line
from engine.system.rendezvous import meet
from engine.training.batching import steps_of
from engine.training.evaluation import ClientLoss, client_loss
from engine.training.generation import Prompt
from engine.training.local_training import Job
from engine.workers.secure_group import SecureGang, SecureRank, aggregate_of
from engine.workers.token_columns import Parts, find_tokens, receive_tokens, token_columns
from engine.workers.worker import FLOAT_BYTES
from strategies.core.layout import Layout
from strategies.core.protocol import Update
from strategies.core.seeds import torch_seed
from strategies.core.sharding import Partition
from strategies.privacy.central import CentralPlan
from strategies.transforms.chain import encode


@dataclass(frozen=True)
class Served:
    """What the server's part of a round needs beside the sums: how many clients there are, and its noise."""

    population: int
    plan: CentralPlan | None
    clip: float


class Rank(SecureRank):
    """One process of a gang."""

    def __init__(self, federation: Federation, memory: Path, rank: int) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        heap.use_large_pages()
        torch.set_num_threads(federation.clients.threads)
        always_the_same_bits()
        assert federation.clients.zero is not None
        self.federation, self.zero, self.rank = federation, federation.clients.zero, rank
        self.memory_root, self.memory = memory, ClientMemory(memory / f"{RANK}{rank}")
        self.sum = ExactSum()
        self.failure: GangLost | None = None
        self.socket: socket.socket | None = None
        self.on_gpu = federation.clients.num_gpus > 0 and torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.set_per_process_memory_fraction(min(federation.clients.num_gpus, 1.0))

    def place(self) -> Place:
        """Where Ray put this rank."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Place(context.get_node_id(), gpus[0] if self.on_gpu else None)

    def find_tokens(self, tokens: Path) -> Path | None:
        """Where this rank's node sees the token columns, if it does."""
        return find_tokens(tokens)

    def receive_tokens(self, tokens: Path, parts: Parts) -> Path:
        """Keeps a copy of the token columns on this rank's node; returns its folder."""
        return receive_tokens(tokens, parts)

    def refuse_lost_memory(self) -> None:
        """Raises ValueError if clients remember, and this rank's node does not see the folder where they do."""
        if self.federation.keeps_state:
            refuse_unseen(self.memory_root)

    def form(self, address: str, port: int, tokens: Path) -> tuple[Layout, Partition]:
        """Meets the other ranks at the first one's address and makes the model and its engine with them."""
        if not dist.is_initialized():
            zero = self.zero
            meet(self.rank, zero.ranks, address, port, self.socket, timeout_s=zero.timeout_s, gpu=self.on_gpu)
        # Deepspeed chooses its accelerator when it is imported, and takes seconds for it.
        from engine.models.deepspeed_model import zero_model
        from engine.training.deepspeed_training import ZeroTrainer

        federation = self.federation
        self.tokenizer = load_tokenizer(federation.model)
        assert isinstance(self.tokenizer.pad_token_id, int)
        heap.give_back()
        network = zero_model(federation.model, self.zero, torch_seed(federation.seed, 0, -1, "initial"), self.rank)
        self.trainer = ZeroTrainer(network, self.tokenizer.pad_token_id, federation.model, self.zero, federation.train)
        heap.keep(gathered=self.zero.stage == 3)
        self.tokens = Tokens.open(tokens)
        self.largest = int(self.tokens.counts("train").max())
        self.layout, self.partition = self.trainer.layout, self.trainer.partition
        return self.layout, self.partition

    def base_bytes(self) -> int:
        """The size of the base's weights, of all ranks together."""
        return self.trainer.nbytes

    def initial(self) -> tuple[int, WireState]:
        """The bytes of the state's shard before the first round, and the shard, which stays in the store."""
        start_S = self.trainer.weights().cpu()  # nobody has trained yet
        state = state_to_wire(self.federation.strategy.init(start_S, self.trainer.layout))
        return state.nbytes, state

    def serve(
        self, wire: WireState, round_: int, served: Served, *partials: PartialSum | WireAggregate
    ) -> tuple[int, WireState]:
        """The server's part of a round for one shard: the sum over all slots, noise, then the rule; as `initial`."""
        state = state_from_wire(wire, round_, self.federation.seed, served.population)
        aggregate = aggregate_of(partials)
        if served.plan is not None:
            shard = Layout(("shard",), ((len(wire.params),),))
            masks = live_masks(self.federation, self.layout, round_).items()
            live = {name: self.partition.cut(mask, self.rank) for name, mask in masks}
            aggregate, _ = noisy(aggregate, served.plan, served.clip, self.federation, shard, round_, live, self.rank)
        assert aggregate is not None
        after = state_to_wire(self.federation.strategy.apply(state, aggregate))
        return after.nbytes, after

    def run(self, chunk: list[Unit], sent: Sent) -> list[Report]:
        """What this rank does in training a chunk of clients one after another, and adding them up."""
        reports = []
        for (client,) in self.tokens.in_advance(chunk):
            report, update = self.trained(client, sent)
            if update is not None:
                self.sum.add(update)
            reports.append(report)
        return reports

    def trained(self, client: int, sent: Sent) -> tuple[Report, Update | None]:
        """Trains a client: its report, the same in all ranks, and this rank's shard of its update."""
        began = time.monotonic()
        federation, rows = self.federation, self.tokens.rows(client, "train")
        state = state_from_wire(ray.get(sent.parts[self.rank]), sent.round, federation.seed)
        got = replace(federation.strategy.broadcast(state), whole_norm=self._whole_norm)
        memory = self.memory.read(client, got.round) if federation.keeps_state else {}
        down, up = (self.summed(floats * FLOAT_BYTES) for floats in federation.strategy.floats(got))
        traffic = {DOWN: down, UP: up}
        steps = steps_of(rows.num_rows, federation.train)
        if late := federation.clients.availability.late_by_seed(client, steps, federation.seed):
            return Report(client, traffic, late=late), None
        try:
            job = Job(client, rows, federation.privacy.weight(rows.num_rows, self.largest), got, memory)
            ((update, after),) = self.trainer.updates([job], federation, lent=True)
            self._refuse_useless(update, [*after.values()])
        except NonFiniteUpdate as error:
            return Report(client, traffic, failed=str(error), seconds=time.monotonic() - began), None
        update, _ = encode(federation.transforms, update, got, {})
        if sent.dp is not None:
            update = sent.dp.encode(update, sent.clip, self._whole_norm)
        if federation.keeps_state:
            self.memory.write(client, got.round + 1, after, sent.oldest)
        update = replace(update, metrics=update.metrics | traffic)
        return Report(client, update.metrics, seconds=time.monotonic() - began), update

    def _whole_norm(self, norm: float) -> float:
        """The L2 norm of a vector from that of its shard here; all ranks ask at once."""
        return math.sqrt(self.summed(norm * norm))

    def summed(self, value: float) -> float:
        """The sum over all ranks."""
        return self.trainer.summed(value)

    def _refuse_useless(self, update: Update, remembered: Sequence[torch.Tensor]) -> None:
        """NonFiniteUpdate on all ranks if one of them has an update, or a memory, that no sum can use."""
        try:
            bound = finite_bound(update)
            if not all(tensor.isfinite().all() for tensor in remembered):
                bound = float("nan")
        except NonFiniteUpdate:
            bound = float("nan")
        bounds = torch.tensor([bound], dtype=torch.float64, device=self.trainer.works_on)
        gathered = [torch.empty_like(bounds) for _ in range(self.zero.ranks)]
        dist.all_gather(gathered, bounds)
        largest = torch.cat(gathered).max().item()
        if not np.isfinite(largest):
            raise NonFiniteUpdate("its update, or what it would remember, holds NaN or infinity")
        if largest >= LIMIT:
            raise NonFiniteUpdate(f"its update reaches {largest:.3g}, beyond the exact sum's range of {LIMIT:.3g}")

    def close_round(self) -> tuple[int, PartialSum]:
        """The bytes of this rank's shard of the sum since the last close, and the shard, which stays in the store."""
        partial = self.sum.close()
        return partial.nbytes, partial

    def evaluate(self, chunk: list[int], sent: Sent, limit: int) -> list[ClientLoss]:
        """What this rank does in judging at most `limit` held-out rows of each client; losses are of all ranks."""
        self._become(sent)
        losses = []
        for client in chunk:
            rows, evaluate = self.tokens.rows(client, "heldout"), replace(self.federation.evaluate, rows=limit)
            losses.append(client_loss(self.trainer, client, rows, evaluate, self.federation.seed))
        return losses

    def generate(self, sent: Sent, prompts: list[Prompt], tokens: int) -> list[str]:
        """Greedy continuations, one per prompt; all ranks generate the same."""
        self._become(sent)
        return self.trainer.generate(self.tokenizer, prompts, tokens)

    def _become(self, sent: Sent) -> None:
        self.trainer.become(borrow(ray.get(sent.parts[self.rank]).params))

    def lead(self, method: str, *arguments: Any) -> Any:
        """What the first rank answers when all ranks do the same; GangLost when one of them cannot."""
        try:
            return getattr(self, method)(*arguments)
        except LOST:
            raise
        except Exception as error:
            if _is_users(error, method):
                raise
            raise GangLost(f"a rank of a gang failed: {type(error).__name__}: {last_line(error)}") from None

    def follow(self, leader: Any, method: str, *arguments: Any) -> None:
        """Does what the first rank does at the same time; what is not the recipe's fault ends the first rank too.

        It may be stopped, or wait for this rank in a collective, and then nobody else would tell the pool.
        """
        try:
            getattr(self, method)(*arguments)
        except Exception as error:
            if self.failure is None:  # what it is asked next fails for the first rank's end
                kind = ShardLost if isinstance(error, ObjectLostError) else GangLost
                self.failure = kind(f"a rank of a gang failed: {type(error).__name__}: {last_line(error)}")
            if not _is_users(error, method):
                ray.kill(leader)
            raise

    def why(self) -> GangLost | None:
        """What made this rank fail first, if it did."""
        return self.failure


def _is_users(error: Exception, method: str) -> bool:
    """Whether the user can mend it, and all ranks meet it; what a client raises ends its gang, as it would a slot."""
    return isinstance(error, ValueError) and method not in ("run", "masked")


class Gang(SecureGang, Rank):
    """The first rank, which speaks for all where the driver asks for something that is not in shards."""

    def __init__(self, federation: Federation, memory: Path, rank: int) -> None:
        Rank.__init__(self, federation, memory, rank)
        SecureGang.__init__(self)

    def tokenize(self, store: Path, shared: str | None) -> Path:
        """Makes or finds the store's token columns, in `shared` too; returns their folder."""
        return token_columns(store, self.federation, shared)

    def address(self) -> tuple[str, int]:
        """Where the ranks meet: the first one listens there, and on this address alone."""
        address = ray.util.get_node_ip_address()
        self.socket = socket.create_server((address, 0))
        return address, self.socket.getsockname()[1]

    def export(self, sent: Sent, card: str) -> Iterator[tuple[str, bytes]]:
        """The files of the model folder, one after another; the shards stay mapped from the object store."""
        trainer, shards = self.trainer, [borrow(ray.get(part).params) for part in sent.parts]
        vector = Sharded(trainer.layout, partial(trainer.partition.read, shards))
        yield from sharded_files(trainer.network, vector, self.federation.model, self.tokenizer, card)
