"""ClientActor: a slot in one process, as Ray calls it. It becomes one client after another on a base that it maps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_partition.store.store import SplitName
from engine.aggregation.accumulators import SingleUpdates
from engine.aggregation.exact_sum import PartialSum, cut
from engine.aggregation.ring_encoding import noise
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.exposure import Opening
from engine.messages.tasks import Unit
from engine.models.adapters import refuse_other_adapters
from engine.models.base_model import PackedBase, read_base
from engine.models.export import export_files, prompt_files
from engine.models.frozen import map_frozen, read_frozen
from engine.models.mapped_base import MappedBase, mapped_buffer
from engine.models.prefixed import STORED, Projection
from engine.models.seeded import Seeded
from engine.models.tokenizer import load_tokenizer, padding, received_tokenizer
from engine.system.page_protection import drop_pages
from engine.training.lanes import LaneTrainer, adapted_layers, best_lanes
from engine.training.local_training import ClientTrainer, LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.training.remote_training import PlugInJudge, RemoteTrainer
from engine.training.searching import SearchTrainer, judge_at_home
from engine.training.zeroth_order import ZerothTrainer
from engine.workers.evaluator import ClientLoss, Evaluator
from engine.workers.handle import Handle
from engine.workers.process import Attached, WorkerProcess, delegate
from strategies.core.layout import Layout
from strategies.core.seeds import torch_seed
from strategies.core.sharding import Partition

SPLITS: tuple[SplitName, ...] = ("train", "heldout")


class Trainers:
    """Chooses the trainer of a unit: a search, in lanes, with the noise of example-level privacy, or the plain one."""

    def __init__(self, federation: Federation, plain: LocalTrainer) -> None:
        self.federation, self.plain = federation, plain
        self.lanes: LaneTrainer | None = None  # made when it is first needed

    def of(self, unit: Unit, message: BroadcastMessage) -> ClientTrainer:
        """Returns the unit's trainer."""
        strategy = self.federation.strategy
        if strategy.searches:
            return SearchTrainer(judge_at_home(self.plain, self.federation.train.batch, strategy.judges_by))
        if len(unit) > 1:
            self.lanes = self.lanes or LaneTrainer(self.plain, message.lanes, self.federation.train)
            return self.lanes
        if message.noise_plan is None or message.noise_plan.adds_to != "gradients":
            return self.plain
        return PrivateTrainer(self.plain, message.noise_plan, noise(self.federation, message.round, unit[0]))


class ClientActor(WorkerProcess):
    """One slot: `attach` gives it base and rows, `run` trains chunks, `forget_sum` resets the sum after a round."""

    section_of_sum = delegate(lambda process: process.sum.section)
    merge_weights = delegate(lambda process: process.attached.base.trainable.merge_weights)
    use_merged = delegate(lambda process: process.attached.base.use_merged)
    evaluate_personal = delegate(lambda process: process.attached.evaluator.personal)
    local_only = delegate(lambda process: process.attached.evaluator.local_only)
    centralized = delegate(lambda process: process.attached.evaluator.centralized)

    def __init__(self, federation: Federation, folder: Path) -> None:
        if not federation.model.has_owner:
            import peft  # noqa: F401  # takes seconds: here all slots take them at the same time

        super().__init__(federation, folder)
        self.each = SingleUpdates()

    def load_base(self) -> tuple[int, PackedBase, np.ndarray]:
        """Returns the base's number of bytes, its index and the bytes, of which the last two stay in the store."""
        packed, base = read_base(self.federation.model, scores=self.federation.scores)
        return packed.nbytes, packed, base

    def load_frozen(self, number: int) -> tuple[int, PackedBase, np.ndarray]:
        """Returns the bytes, index and buffer of the objective's frozen model of this number, as `load_base` does."""
        packed, buffer = read_frozen(self.federation.train.objective.models[number], self.federation.model)
        return packed.nbytes, packed, buffer

    def attach_ends(
        self, packed: PackedBase, base: Any, tokens: Path, first: bool, owner: Any, files: dict[str, bytes]
    ) -> tuple[Layout, np.ndarray]:
        """As `attach`, with an emulator as base; its owner judges what clients train, plugged into the base."""
        self.service = Handle(owner)
        tokenizer = received_tokenizer(self.federation.model, files)
        attached = self._attach(packed, base, tokens, first, tokenizer)
        self.emulator = self.attached.evaluator
        judge = PlugInJudge(self.attached.trainer, self.service)
        self.attached.evaluator = Evaluator(self.attached.runner, judge, tokenizer)
        return attached

    def evaluate_emulator(self, chunk: list[int], message: BroadcastMessage, limit: int) -> list[ClientLoss]:
        """As `evaluate`, by the emulator with the ends instead of the base."""
        return self.emulator.losses(chunk, message, limit)

    def attach(
        self, packed: PackedBase, base: Any, tokens: Path, first: bool, *frozen: Any
    ) -> tuple[Layout, np.ndarray]:
        """Maps base (see MappedBase) and rows; returns the layout, and of the `first` slot the initial vector (P,).

        `frozen` are the index and buffer of each of the objective's frozen models, one after another.
        """
        return self._attach(packed, base, tokens, first, load_tokenizer(self.federation.model), *frozen)

    def _attach(
        self, packed: PackedBase, base: Any, tokens: Path, first: bool, tokenizer: Any, *frozen: Any
    ) -> tuple[Layout, np.ndarray]:
        federation = self.federation
        seed = torch_seed(federation.seed, 0, -1, "initial")
        mapped = MappedBase(packed, base, federation.model, seed, self.device)
        trainable = mapped.trainable
        pairs = zip(federation.train.objective.models, frozen[::2], frozen[1::2], strict=True)
        models = [
            map_frozen(model, index, mapped_buffer(buffer, self.device), federation.model)
            for model, index, buffer in pairs
        ]
        pad = padding(tokenizer, trainable.network)
        trainer: Any = LocalTrainer(trainable, pad, federation.train, tokenizer, models)
        if isinstance(trainable, Seeded):
            trainer = ZerothTrainer(trainer, trainable)
        refuse_other_adapters(trainable.network, federation)
        if isinstance(federation.clients.lanes, int) and federation.clients.lanes > 1:
            adapted_layers(trainable)  # refuses models that lanes cannot train
        trainer_of, layout = Trainers(federation, trainer).of, trainable.layout
        self.attached = Attached(self, tokens, trainer, tokenizer, trainer_of, layout, base=mapped)
        initial = trainable.initial.numpy()
        del trainable.initial
        copied = layout.size == sum(parameter.numel() for parameter in trainable.network.parameters())
        if copied and self.device.type == "cpu":
            drop_pages(base)  # its weights have all been copied, since all are trained
        return layout, initial if first else np.empty(0, np.float32)

    def attach_remote(self, provider: Any, opening: Opening, tokens: Path, first: bool) -> tuple[Layout, np.ndarray]:
        """As `attach`, where a provider has the base: this process gets a handle, and what the opening tells."""
        federation, self.opening = self.federation, opening
        peft, start = federation.model.peft, torch.from_numpy(opening.start_P.copy())
        layout, projection = Layout((STORED,), (opening.shape,), choices=opening.sizes.tokens), None
        if peft.injected is not peft:
            seed = torch_seed(federation.seed, 0, -1, "initial")
            projection = Projection.drawn(peft, start, opening.spread, seed)
            start = torch.zeros(projection.matrix_Pd.shape[1])
            layout = Layout((STORED,), (tuple(start.shape),))
        self.service = Handle(provider)
        trainer = RemoteTrainer(self.service, federation, start, projection)
        search = SearchTrainer(trainer.judged)

        def trainer_of(unit: Unit, message: BroadcastMessage) -> ClientTrainer:
            return search if federation.strategy.searches else trainer

        tokenizer = received_tokenizer(federation.model, opening.tokenizer)
        exposed = trainer.taken
        self.attached = Attached(self, tokens, trainer, tokenizer, trainer_of, layout, exposed=exposed)
        return layout, start.numpy() if first else np.empty(0, np.float32)

    def probe(self, round_: int) -> str:
        """Returns a digest of the provider's answers to public rows in a round."""
        digest: str = self.service.probe(round_)
        return digest

    def run_each(self, chunk: list[Unit], message: BroadcastMessage) -> Any:
        """As `run`, but returns each client's update beside the reports, None where it could not be used."""
        reports = self.attached.runner.run(chunk, message, self.each)
        updates = self.each.take()
        return reports, *(updates.get(report.client) for report in reports)

    def best_lanes(self, message: BroadcastMessage, most: int, clients: int, neighbors: int) -> int:
        """Returns how many lanes are fastest, up to `most`; slots, the `neighbors` share the node's memory."""
        trainer, tokens, start = self.attached.trainer, self.attached.runner.tokens, message.vector().to(self.device)
        return best_lanes(trainer, tokens, clients, most, neighbors, start, self.federation.train)

    def reference_columns(self, chunk: list[int], message: BroadcastMessage) -> list[tuple[int, np.ndarray]]:
        """Returns what the reference model says of each client's rows (rows, G), training rows first."""
        trainer, tokens, reference = self.attached.trainer, self.attached.runner.tokens, message.reference_vector()
        columns = []
        for client in chunk:
            splits = [tokens.rows(client, split) for split in SPLITS]
            of_splits = [trainer.reference_column(rows, reference) for rows in splits if rows.num_rows]
            columns.append((client, np.concatenate(of_splits or [np.empty((0, 1), np.float32)])))
        return columns

    def forget_sum(self) -> None:
        """Starts again at zero."""
        self.sum.take()

    def close_in_shards(self, partition: Partition) -> tuple[int | PartialSum, ...]:
        """Returns the bytes of the sum since the last close, and the sum as groups of ranks cut it."""
        partial = self.sum.take()
        return partial.nbytes, *(cut(partial, partition, rank) for rank in range(len(partition.intervals)))

    def export(self, message: BroadcastMessage, card: str) -> Iterator[tuple[str, bytes]]:
        """Yields the files of the model folder, one after another."""
        trainer, base, tokenizer = self.attached.trainer, self.attached.base, self.attached.tokenizer
        model, vector = self.federation.model, message.vector()
        if model.peft.plugs_in:
            files = self.service.export(vector.numpy(), card)
        elif base is None:
            sizes, places = self.opening.sizes, None if self.opening.sizes.tokens else trainer.places(vector)
            files = prompt_files(vector, places, sizes, model, tokenizer, card)
        else:
            trainer.become(vector)
            files = export_files(base.trainable, model, tokenizer, card, merged=base.merged is not None)
        yield from ((name, content) for name, content in files.items())  # Ray wants a generator, not an iterator
