"""What all worker processes have: placement, token columns, a sum, and the clients of secure aggregation."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from datasets_partition.store.tokens import Tokens
from engine.aggregation.accumulators import RingSum
from engine.aggregation.exact_sum import ExactSum
from engine.aggregation.ring_encoding import sent_masks_of
from engine.aggregation.ring_shard import RingShard
from engine.aggregation.secure_clients import SecureClients
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.reports import Report
from engine.messages.shards import AggregateShard
from engine.messages.tasks import Place, Unit
from engine.models.base_model import always_the_same_bits
from engine.records.client_state import RANK, ClientStates, refuse_unseen
from engine.system.allocator import use_large_pages
from engine.workers import token_columns as columns
from engine.workers.client_runner import ALONE, ClientRunner, Exposed, Peers, TrainerOf, nothing_exposed
from engine.workers.evaluator import Evaluator
from strategies.core.layout import Layout
from strategies.secagg.masks import Masks
from strategies.secagg.messages import Inbox, MaskedSum
from strategies.secagg.protocol import Session


def delegate(method_of: Callable[["WorkerProcess"], Callable[..., Any]]) -> Callable[..., Any]:
    """Makes an actor's method out of a component's, which documents it: Ray calls only methods of the actor itself."""

    def method(self: "WorkerProcess", *arguments: Any) -> Any:
        return method_of(self)(*arguments)

    return method


def settle(federation: Federation) -> torch.device:
    """Prepares a process that computes with models: threads, memory, the same bits; returns its device."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    use_large_pages()
    torch.set_num_threads(federation.clients.threads)
    always_the_same_bits()
    device = torch.device("cuda" if federation.clients.num_gpus > 0 and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(federation.clients.num_gpus, 1.0))
    return device


def place_of(device: torch.device) -> Place:
    """Returns where Ray put this process, which computes on a device."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return Place(context.get_node_id(), gpus[0] if device.type == "cuda" else None)


class SecureTraining:
    """Trains a worker's clients into a ring sum and masks this rank's shard; the first rank alone has secrets."""

    def __init__(self, runner: ClientRunner, clients: SecureClients) -> None:
        self.runner, self.clients = runner, clients
        self.rings: dict[int, RingSum] = {}  # by round: that of the present one
        self.masked_S = np.empty(0, np.uint32)  # what follows the head, in a gang

    def masked(self, inboxes: dict[int, Inbox], message: BroadcastMessage) -> tuple[list[Report], MaskedSum] | None:
        """Third trip: trains who is pending, and masks the sum. The first rank answers, with the head of a shard."""
        runner, peers, leads = self.runner, self.runner.peers, not self.runner.peers.rank
        work = peers.from_first(self.clients.pending(inboxes) if leads else None)
        if work.fresh:
            shard, federation = self._shard(work.session), runner.federation
            ring = RingSum(shard, federation, message.noise_plan, message.round, peers.summed)
            self.rings = {message.round: ring}
        ring = self.rings[message.round]
        reports = runner.run(work.units, message, ring) if work.units else []
        masked_S = ring.masked(peers.from_first(self.clients.masks(reports, inboxes) if leads else None))
        if peers.partition is None:
            return self.clients.answer(masked_S)
        head, self.masked_S = np.split(masked_S, [ring.shard.head])
        return self.clients.answer(head) if leads else None

    def masked_shard(self) -> tuple[bool, np.ndarray]:
        """Returns that the masked shard is there, and the shard for the store."""
        return True, self.masked_S

    def unmask_shard(
        self, session: Session, removals: Masks, count: int, weight: float, *masked: np.ndarray
    ) -> tuple[dict[str, float], AggregateShard]:
        """The server's part for this rank's shard of all slots' masked vectors: figures, and the sums for the store."""
        return self._shard(session).unmasked(list(masked), removals, count, weight)

    def _shard(self, session: Session) -> RingShard:
        runner, peers = self.runner, self.runner.peers
        sent_masks = sent_masks_of(runner.federation, runner.layout, session.round)
        return RingShard(session.sums, sent_masks, peers.partition, peers.rank or 0)


class Attached:
    """What a worker process is once it has base and rows. `base` is what a single process maps."""

    def __init__(
        self,
        process: "WorkerProcess",
        tokens: Path,
        trainer: Any,
        tokenizer: Any,
        trainer_of: TrainerOf,
        layout: Layout,
        peers: Peers = ALONE,
        base: Any = None,
        exposed: Exposed = nothing_exposed,
    ) -> None:
        """`exposed` tells what clients have shown to the base's owner, if this process has no base."""
        self.trainer, self.tokenizer, self.base = trainer, tokenizer, base
        states = ClientStates(process.folder if peers.rank is None else process.folder / f"{RANK}{peers.rank}")
        self.runner = ClientRunner(process.federation, Tokens.open(tokens), states, trainer_of, layout, peers, exposed)
        self.evaluator: Evaluator = Evaluator(self.runner, trainer, tokenizer)
        self.secure: SecureTraining = SecureTraining(self.runner, process.secure)


class WorkerProcess:
    """A process that Ray has placed; `folder` is where client state lies. Of a group of ranks each is one."""

    attached: Attached  # set once base and rows are there: Ray places a process before
    secure: SecureClients

    find_tokens, receive_tokens = staticmethod(columns.find_tokens), staticmethod(columns.receive_tokens)
    open = delegate(lambda process: process.secure.open)
    shares = delegate(lambda process: process.secure.shares)
    agree = delegate(lambda process: process.secure.agree)
    unmask = delegate(lambda process: process.secure.unmask)
    roster = delegate(lambda process: process.secure.roster)
    masked = delegate(lambda process: process.attached.secure.masked)
    evaluate = delegate(lambda process: process.attached.evaluator.losses)
    generate = delegate(lambda process: process.attached.evaluator.generate)
    rollouts = delegate(lambda process: process.attached.evaluator.rollouts)

    def __init__(self, federation: Federation, folder: Path) -> None:
        self.federation, self.folder = federation, folder
        self.sum, self.secure = ExactSum(), SecureClients()
        self.device = settle(federation)

    def place(self) -> Place:
        """Returns where Ray put this process."""
        return place_of(self.device)

    def refuse_lost_states(self) -> None:
        """Raises RunError if clients keep state, and this process's node does not see its folder."""
        if self.federation.keeps_state:
            refuse_unseen(self.folder)

    def tokenize(self, store: Path, shared: str | None) -> Path:
        """Makes or finds the store's token columns, in `shared` too; returns their folder."""
        return columns.token_columns(store, self.federation, shared)

    def run(self, chunk: list[Unit], message: BroadcastMessage) -> list[Report]:
        """Trains units one after another, and adds their clients' updates, or this rank's shards, to the sum."""
        return self.attached.runner.run(chunk, message, self.sum)
