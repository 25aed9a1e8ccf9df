"""ClientActor: a slot in one process, as Ray calls it. It becomes one client after another on a base that it maps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets_partition.store.tokens import Tokens
from engine.aggregation.accumulators import SingleUpdates
from engine.aggregation.exact_sum import ExactSum, PartialSum, cut
from engine.aggregation.ring_encoding import noise
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.reports import Report
from engine.messages.tasks import Unit
from engine.models.base_model import PackedBase, load_tokenizer, read_base
from engine.models.export import export_files
from engine.records.client_state import ClientStates
from engine.training.evaluation import ClientLoss
from engine.training.generation import Prompt, continuations
from engine.training.lane_count import best_lanes
from engine.training.lanes import LaneTrainer, adapted_layers
from engine.training.local_training import LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.workers.client_runner import ClientRunner
from engine.workers.evaluator import Evaluator, OwnModels
from engine.workers.mapped_base import MappedBase
from engine.workers.process import WorkerProcess
from engine.workers.secure_training import SecureTraining
from strategies.core.layout import Layout
from strategies.core.seeds import torch_seed
from strategies.core.sharding import Partition
from strategies.privacy.per_example import ExamplePlan
from strategies.secagg.messages import Inbox, MaskedSum


class Trainers:
    """Chooses the trainer of a unit: in lanes, with the noise of example-level privacy, or the plain one."""

    def __init__(self, federation: Federation, plain: LocalTrainer) -> None:
        self.federation, self.plain = federation, plain
        self.lanes: LaneTrainer | None = None
        self.private: PrivateTrainer | None = None

    def of(self, unit: Unit, message: BroadcastMessage) -> LocalTrainer | LaneTrainer | PrivateTrainer:
        """Returns the unit's trainer; one is made when it is first needed."""
        plain, train = self.plain, self.federation.train
        if len(unit) > 1:
            self.lanes = self.lanes or LaneTrainer(plain, message.lanes, train)
            return self.lanes
        if not isinstance(message.dp, ExamplePlan):
            return plain
        if self.private is None:
            self.private = PrivateTrainer(plain, message.dp)
        self.private.words = noise(self.federation, message.round, unit[0])
        return self.private


@dataclass(frozen=True)
class Attached:
    """What a slot has once it has base and rows."""

    base: MappedBase
    tokenizer: Any
    trainer: LocalTrainer
    runner: ClientRunner
    evaluator: Evaluator
    own_models: OwnModels
    secure: SecureTraining


class ClientActor(WorkerProcess):
    """One slot: `attach` gives it base and rows, `run` trains chunks, `forget_sum` resets the sum after a round."""

    def __init__(self, federation: Federation, folder: Path) -> None:
        import peft  # noqa: F401  # takes seconds: here all slots take them at the same time

        super().__init__(federation, folder)
        self.sum, self.each = ExactSum(), SingleUpdates()
        self._attached: Attached | None = None

    @property
    def attached(self) -> Attached:
        """What `attach` has made."""
        assert self._attached is not None
        return self._attached

    def load_base(self) -> tuple[int, PackedBase, np.ndarray]:
        """Returns the base's number of bytes, its index and the bytes: as three values, the last two stay in the store.

        The driver never asks for the index: its configuration would bring transformers' models into that process.
        """
        packed, base = read_base(self.federation.model)
        return packed.nbytes, packed, base

    def attach(self, packed: PackedBase, base: Any, tokens: Path, first: bool) -> tuple[Layout, np.ndarray]:
        """Maps base (see MappedBase) and rows, and makes all that trains and judges on them.

        Returns the layout, and of the `first` slot the initial vector (P,), of which the others have the same.
        """
        federation = self.federation
        seed = torch_seed(federation.seed, 0, -1, "initial")
        mapped = MappedBase(packed, base, federation.model, seed, self.device)
        trainable, tokenizer = mapped.trainable, load_tokenizer(federation.model)
        assert isinstance(tokenizer.pad_token_id, int)
        trainer = LocalTrainer.of(trainable, tokenizer.pad_token_id, federation.train)
        if isinstance(federation.clients.lanes, int) and federation.clients.lanes > 1:
            adapted_layers(trainable)  # refuses models that lanes cannot train

        states, trainers = ClientStates(self.folder), Trainers(federation, trainer)
        runner = ClientRunner(federation, Tokens.open(tokens), states, trainers.of, trainable.layout)
        evaluator = Evaluator(runner, trainer, trainer.become)
        own_models, secure = OwnModels(runner, evaluator, trainer), SecureTraining(runner, trainable.layout)
        self._attached = Attached(mapped, tokenizer, trainer, runner, evaluator, own_models, secure)
        initial = mapped.take_initial()
        if federation.model.peft.kind == "none":
            mapped.drop_pages()
        return trainable.layout, initial if first else np.empty(0, np.float32)

    def run(self, chunk: list[Unit], message: BroadcastMessage) -> list[Report]:
        """Trains units one after another and adds their clients' updates to this slot's sum."""
        return self.attached.runner.run(chunk, message, self.sum)

    def run_each(self, chunk: list[Unit], message: BroadcastMessage) -> Any:
        """As `run`, but returns each client's update beside the reports, None where it could not be used."""
        reports = self.attached.runner.run(chunk, message, self.each)
        updates = self.each.take()
        return reports, *(updates.get(report.client) for report in reports)

    def masked(self, inboxes: dict[int, Inbox], message: BroadcastMessage) -> tuple[list[Report], MaskedSum]:
        """Third trip of secure aggregation: trains, and returns the masked sum."""
        training = self.attached.secure
        reports = training.train(self.secure.pending(inboxes), message)
        return self.secure.answer(training.masked(self.secure.masks(reports, inboxes)))

    def best_lanes(self, message: BroadcastMessage, most: int, clients: int, neighbors: int) -> int:
        """Returns how many lanes are fastest, up to `most`, measured on some of the first `clients`.

        As many slots as `neighbors` share the node's memory, this one among them.
        """
        trainer, tokens, start = self.attached.trainer, self.attached.runner.tokens, message.vector().to(self.device)
        return best_lanes(trainer, tokens, clients, most, neighbors, start, self.federation.train)

    def merged_weights(self, merged_delta: np.ndarray) -> np.ndarray:
        """See MappedBase.weights_with."""
        return self.attached.base.weights_with(merged_delta)

    def use_weights(self, merged: np.ndarray | None) -> None:
        """See MappedBase.use."""
        self.attached.base.use(merged)

    def part_of_sum(self, first: int, size: int) -> PartialSum:
        """Returns `size` elements, from `first` on, of the sum of all clients since the last was forgotten."""
        return self.sum.part(first, size)

    def forget_sum(self) -> None:
        """Starts again at zero."""
        self.sum.take()

    def close_in_shards(self, partition: Partition) -> tuple[int | PartialSum, ...]:
        """Returns the bytes of the sum since the last close, and the sum as groups of ranks cut it."""
        partial = self.sum.take()
        return partial.nbytes, *(cut(partial, partition, rank) for rank in range(len(partition.parts)))

    def evaluate(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """See Evaluator.losses."""
        return self.attached.evaluator.losses(chunk, message, limit)

    def evaluate_personal(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """See OwnModels.personal."""
        return self.attached.own_models.personal(chunk, message, limit)

    def local_only(self, chunk: list[int], message: BroadcastMessage, steps: list[int]) -> list[ClientLoss]:
        """See OwnModels.local_only."""
        return self.attached.own_models.local_only(chunk, message, steps)

    def centralized(self, clients: list[int], message: BroadcastMessage, steps: int) -> np.ndarray:
        """See OwnModels.centralized."""
        return self.attached.own_models.centralized(clients, message, steps)

    def generate(self, message: BroadcastMessage, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns greedy continuations, one for each prompt."""
        self.attached.evaluator.become(message.vector())
        trainer, tokenizer = self.attached.trainer, self.attached.tokenizer
        return continuations(trainer.trainable.network, trainer.pad, self.device, tokenizer, prompts, tokens)

    def export(self, message: BroadcastMessage, card: str) -> Iterator[tuple[str, bytes]]:
        """Yields the files of the model folder, one after another."""
        self.attached.evaluator.become(message.vector())
        base, tokenizer, merged = self.attached.base, self.attached.tokenizer, self.attached.base.merged is not None
        files = export_files(base.trainable, self.federation.model, tokenizer, card, merged=merged)
        yield from ((name, content) for name, content in files.items())  # Ray wants a generator, not an iterator
