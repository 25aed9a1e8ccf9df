"""ClientActor: a slot that becomes one client after another on a base that it shares with its neighbours."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from datasets_partition.store.tokens import Tokens
from engine.aggregation.exact_sum import ExactSum, NonFiniteUpdate, PartialSum, cut, finite_bound
from engine.aggregation.ring_encoding import noise, ring_vector
from engine.aggregation.secure_clients import SecureClients
from engine.config.federation import Federation
from engine.messages.tasks import Place, Unit
from engine.messages.wire import (
    DOWN,
    UP,
    Report,
    Sent,
    WireBroadcast,
    borrow,
    from_wire,
    joined,
    to_wire,
    update_to_wire,
)
from engine.models.base_model import PackedBase, always_the_same_bits, load_tokenizer, map_base, read_base
from engine.models.export import export_files
from engine.models.gpu_base import map_handle
from engine.models.merged_base import merged_weights, use_weights
from engine.models.trainable import Trainable
from engine.records.client_state import ClientMemory, refuse_unseen
from engine.system.allocator import use_large_pages
from engine.system.page_protection import look_away, protect, release
from engine.training.batching import steps_of
from engine.training.lane_count import best_lanes
from engine.training.lanes import LaneTrainer, adapted_layers
from engine.training.local_training import Job, LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.workers.evaluator import Judge
from engine.workers.retries import attempted
from engine.workers.token_columns import Parts, find_tokens, receive_tokens, token_columns
from strategies.core.layout import Layout
from strategies.core.protocol import Broadcast, ClientState, Update
from strategies.core.seeds import torch_seed
from strategies.core.sharding import Partition
from strategies.privacy.central import CentralPlan
from strategies.privacy.per_example import ExamplePlan
from strategies.secagg.messages import Inbox, MaskedSum
from strategies.secagg.ring import Sums
from strategies.transforms.chain import bits, encode

FLOAT_BYTES = 4


class ClientActor(SecureClients, Judge):
    """One slot. `attach` gives it base and rows; then chunks of clients come, and `forget_sum` ends a round."""

    def __init__(self, federation: Federation, memory: Path) -> None:
        import peft  # noqa: F401  # takes seconds: here all slots take them at the same time
        from transformers.utils import logging as transformers_logging

        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        use_large_pages()
        torch.set_num_threads(federation.clients.threads)
        always_the_same_bits()
        self.federation = federation
        self.memory = ClientMemory(memory)
        self.sum = ExactSum()
        super().__init__()
        self.private: PrivateTrainer | None = None
        self.packed: LaneTrainer | None = None
        self.merged: np.ndarray | None = None
        self.device = torch.device("cuda" if federation.clients.num_gpus > 0 and torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(min(federation.clients.num_gpus, 1.0))

    def place(self) -> Place:
        """Where Ray put this slot."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Place(context.get_node_id(), gpus[0] if self.device.type == "cuda" else None)

    def load_base(self) -> tuple[int, PackedBase, np.ndarray]:
        """How many bytes the base has, its index and they: three return values, so that the last two stay in the store.

        The driver never asks for the index: its configuration would bring transformers' models into that process.
        """
        packed, base = read_base(self.federation.model)
        return packed.nbytes, packed, base

    def tokenize(self, store: Path, shared: str | None) -> Path:
        """Makes or finds the store's token columns, in `shared` too; returns their folder."""
        return token_columns(store, self.federation, shared)

    def refuse_lost_memory(self) -> None:
        """Raises ValueError if clients remember, and this slot's node does not see the folder where they do."""
        if self.federation.keeps_state:
            refuse_unseen(self.memory.folder)

    def find_tokens(self, tokens: Path) -> Path | None:
        """Where this slot's node sees the token columns, if it does."""
        return find_tokens(tokens)

    def receive_tokens(self, tokens: Path, parts: Parts) -> Path:
        """Keeps a copy of the token columns on this slot's node; returns its folder."""
        return receive_tokens(tokens, parts)

    def attach(self, packed: PackedBase, base: Any, tokens: Path, first: bool) -> tuple[Layout, np.ndarray]:
        """Maps base (the store's bytes, or a GPU holder's handle) and rows; a GPU of its own gets a copy of the bytes.

        Returns the layout, and of the `first` slot the initial vector (P,), of which the others have the same.
        """
        if self.device.type == "cpu":
            protect(base)
        buffer = map_handle(base) if isinstance(base, tuple) else borrow(base).to(self.device)
        self.base = base  # a live reference: the store must not reuse pages that this process may not write
        federation = self.federation
        seed = torch_seed(federation.seed, 0, -1, "initial")
        trainable = Trainable(map_base(packed, buffer), federation.model, seed)
        self.tokenizer = load_tokenizer(federation.model)
        assert isinstance(self.tokenizer.pad_token_id, int)
        self.trainer = LocalTrainer.of(trainable, self.tokenizer.pad_token_id, federation.train)
        if isinstance(federation.clients.lanes, int) and federation.clients.lanes > 1:
            adapted_layers(trainable)  # refuses models that lanes cannot train
        self.tokens = Tokens.open(tokens)
        self.largest = int(self.tokens.counts("train").max())
        initial = trainable.initial.numpy() if first else np.empty(0, np.float32)
        del trainable.initial  # no slot needs it again
        if self.device.type == "cpu" and federation.model.peft.kind == "none":
            look_away(base)  # all that is trained has been copied
        return trainable.layout, initial

    def run(self, chunk: list[Unit], wire: WireBroadcast | Sent) -> list[Report]:
        """Trains the chunk's packs one after another and adds their clients' updates to this slot's sum."""
        whole = wire if isinstance(wire, WireBroadcast) else self._joined(wire)
        packs = self.tokens.in_advance(chunk)
        return [report for pack in packs for report, _ in self._pack(pack, whole, self.sum.add)]

    def _joined(self, sent: Sent) -> WireBroadcast:
        """What gangs are sent, for a client that is none."""
        state = joined(sent, ray.get(list(sent.parts)), self.federation.seed)
        wire = to_wire(self.federation.strategy.broadcast(state))
        return replace(wire, oldest=sent.oldest, dp=sent.dp, clip=sent.clip, lanes=sent.lanes)

    def run_each(self, chunk: list[Unit], wire: WireBroadcast) -> Any:
        """As `run`, and gives each client's update beside the reports, None where it could not be used."""
        # Its values may be a liar's, however large: rules that read each are there to survive them.
        packs = self.tokens.in_advance(chunk)
        done = [
            (report, update and update_to_wire(update))
            for pack in packs
            for report, update in self._pack(pack, wire, finite_bound)
        ]
        reports, updates = zip(*done, strict=True)
        return list(reports), *updates

    def masked(self, inboxes: Mapping[int, Inbox], wire: WireBroadcast) -> tuple[list[Report], MaskedSum]:
        """Third trip of secure aggregation: trains and gives the masked sum; reports tell no figures and no errors."""
        layout = self.trainer.trainable.layout

        def train(pack: Unit, sums: Sums) -> Iterator[tuple[Report, np.ndarray | None]]:
            for report, update in self._pack(pack, wire, finite_bound):
                told = replace(report, metrics={DOWN: report.metrics[DOWN]}, tried=())
                try:
                    yield told, None if update is None else ring_vector(update, sums, wire, self.federation, layout)
                except ValueError as error:  # such as a loss that is none
                    yield replace(told, failed=str(error)), None

        return self.mask(inboxes, train)

    def best_pack(self, params: np.ndarray, most: int, clients: int, neighbours: int) -> int:
        """How many lanes are fastest, up to `most`: measured from `params` (P,) on some of the first `clients`.

        As many slots as `neighbours` share the node's memory, this one among them.
        """
        start = borrow(params).to(self.device)
        return best_lanes(self.trainer, self.tokens, clients, most, neighbours, start, self.federation.train)

    def _pack(
        self, pack: Unit, wire: WireBroadcast, take: Callable[[Update], object]
    ) -> list[tuple[Report, Update | None]]:
        """Trains a pack; `take` gets each update before it is remembered, and may refuse it by NonFiniteUpdate."""
        shared = from_wire(wire, self.trainer.trainable.layout, self.federation.seed)
        late = {client: report for client in pack if (report := self._late(client, shared))}
        there = tuple(client for client in pack if client not in late)
        done = iter(self._trained(there, shared, wire, take) if there else [])
        return [(late[client], None) if client in late else next(done) for client in pack]

    def _late(self, client: int, shared: Broadcast) -> Report | None:
        """What comes of a client that is too slow by the seed: it gets the broadcast, and need not train in vain."""
        steps = steps_of(int(self.tokens.counts("train")[client]), self.federation.train)
        late = self.federation.clients.availability.late_by_seed(client, steps, self.federation.seed)
        if not late:
            return None
        down, _ = self.federation.strategy.floats(replace(shared, rank=self._rank(client)))
        return Report(client, {DOWN: down * FLOAT_BYTES, UP: 0.0}, late=late)

    def _trained(
        self, pack: Unit, shared: Broadcast, wire: WireBroadcast, take: Callable[[Update], object]
    ) -> list[tuple[Report, Update | None]]:
        """Trains clients of a pack: see `_pack`."""
        began = time.monotonic()

        def train(some: Unit) -> list[tuple[Job, Update, ClientState]]:
            jobs = []
            for client in some:
                rows, got = self.tokens.rows(client, "train"), replace(shared, rank=self._rank(client))
                weight = self.federation.privacy.weight(rows.num_rows, self.largest)
                jobs.append(Job(client, rows, weight, got, self._remembered(client, wire.round)))
            # What is left of a pack is trained before any of it is told.
            done = self._trainer(some, wire).updates(jobs, self.federation, lent=len(pack) == 1)
            return [(job, *one) for job, one in zip(jobs, done, strict=True)]

        found = attempted(pack, train, self.federation.clients.retries)
        trained_s, sent = (time.monotonic() - began) / len(pack), list[tuple[Report, Update | None]]()
        for one in found:
            if one.result is None:
                sent.append((Report.of_nothing(one.client, one.why), None))
                continue
            report, update = self._sent(one.result, wire, take, trained_s)
            sent.append((replace(report, tried=one.why), update))
        seconds = (time.monotonic() - began) / len(pack)  # adding large updates up takes its time too
        return [(replace(report, seconds=seconds), update) for report, update in sent]

    def _sent(
        self,
        done: tuple[Job, Update, ClientState],
        wire: WireBroadcast,
        take: Callable[[Update], object],
        trained_s: float,
    ) -> tuple[Report, Update | None]:
        """What becomes of a client's update and of its memory, after so many seconds of training."""
        job, update, after = done
        federation, client, got = self.federation, job.client, job.broadcast
        update, squeezed = encode(federation.transforms, update, got, job.state)
        down, up = federation.strategy.floats(got)
        # Transforms shorten the update alone, and not what the rule sends beside it.
        beside = max(0, up - got.params.numel())
        sent = bits(federation.transforms, up - beside) / 8 + beside * FLOAT_BYTES
        traffic = {DOWN: down * FLOAT_BYTES, UP: sent}
        update = replace(update, metrics=update.metrics | traffic)
        after |= squeezed
        if late := federation.clients.availability.late_by_clock(trained_s):
            return Report(client, traffic, late=late), None
        try:
            if not all(tensor.isfinite().all() for tensor in after.values()):
                raise NonFiniteUpdate("what it would remember holds NaN or infinity")
            if isinstance(wire.dp, CentralPlan):
                finite_bound(update)
                update = wire.dp.encode(update, wire.clip)
            take(update)
        except NonFiniteUpdate as error:
            return Report(client, traffic, failed=str(error)), None
        if federation.keeps_state:
            self.memory.write(client, wire.round + 1, after, wire.oldest)
        return Report(client, update.metrics), update

    def _trainer(self, pack: Unit, wire: WireBroadcast) -> LocalTrainer | LaneTrainer | PrivateTrainer:
        """The trainer of clients; under example-level privacy one that adds noise, which baselines do without."""
        if len(pack) > 1:
            if self.packed is None:
                self.packed = LaneTrainer(self.trainer, wire.lanes, self.federation.train)
            return self.packed
        if not isinstance(wire.dp, ExamplePlan):
            return self.trainer
        if self.private is None:
            self.private = PrivateTrainer(self.trainer, wire.dp)
        self.private.words = noise(self.federation, wire.round, pack[0])
        return self.private

    def merged_weights(self, residual: np.ndarray) -> np.ndarray:
        """The adapted layers' weights with the products of `residual` (float32) in them (uint8): see rebase.py."""
        return merged_weights(self.trainer.trainable, residual)

    def use_weights(self, merged: np.ndarray | None) -> None:
        """Lets this slot's model look at other weights (uint8) of the adapted layers; None: at the first base."""
        if merged is not None and self.device.type == "cpu":
            protect(merged)
        use_weights(self.trainer.trainable, None if merged is None else borrow(merged).to(self.device))
        if self.merged is not None and self.device.type == "cpu":
            release(self.merged)
        self.merged = merged  # a live reference, as `base`

    def part_of_sum(self, first: int, size: int) -> PartialSum:
        """So many elements, from `first` on, of the sum of all clients since the last was forgotten."""
        return self.sum.part(first, size)

    def forget_sum(self) -> None:
        """Starts again at nothing."""
        self.sum.close()

    def close_in_shards(self, partition: Partition) -> tuple[int | PartialSum, ...]:
        """The bytes of the sum since the last close, and the sum cut as gangs cut it."""
        partial = self.sum.close()
        return partial.nbytes, *(cut(partial, partition, rank) for rank in range(len(partition.parts)))

    def export(self, params: np.ndarray, card: str) -> Iterator[tuple[str, bytes]]:
        """The files of the model folder for the vector `params` (P,), one after another."""
        self._become(params)
        merged = self.merged is not None
        files = export_files(self.trainer.trainable, self.federation.model, self.tokenizer, card, merged=merged)
        yield from ((name, content) for name, content in files.items())  # Ray wants a generator, not an iterator
