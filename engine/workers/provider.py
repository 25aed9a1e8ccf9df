"""Provider: the owner of a base that clients do not have, as Ray calls it. It alone reads and maps the base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.messages.exposure import Opening, PromptGradient, Scores, Texts
from engine.messages.shards import borrow
from engine.messages.tasks import Place
from engine.models.base_model import PackedBase, map_base, pack, read_base
from engine.models.ends import align, emulator_of
from engine.models.export import ends_files, export_files
from engine.models.mapped_base import MappedBase, mapped_buffer
from engine.models.prefixed import spread_of
from engine.models.tokenizer import load_tokenizer, padding, tokenizer_files
from engine.objectives.base import Prompt, TermSums
from engine.training.local_training import LocalTrainer
from engine.training.rollouts import own_samples
from engine.workers import token_columns as columns
from engine.workers.base_service import BaseService
from engine.workers.process import place_of, settle
from strategies.core.access import PARTY
from strategies.core.seeds import torch_seed


class Provider:
    """A replica of the provider. `open` gives it the base; after that each call is checked as BaseService says."""

    service: BaseService

    def __init__(self, federation: Federation) -> None:
        import peft  # noqa: F401  # takes seconds: here all processes take them at the same time

        self.federation, self.device = federation, settle(federation)

    def place(self) -> Place:
        """Returns where Ray put this process."""
        return place_of(self.device)

    def load_base(self) -> tuple[int, PackedBase, np.ndarray]:
        """Returns the base's number of bytes, its index and the bytes, of which the last two stay in the store."""
        packed, base = read_base(self.federation.model)
        return packed.nbytes, packed, base

    def tokenize(self, store: Path, shared: str | None) -> Path:
        """Makes or finds the store's token columns, in `shared` too; returns their folder."""
        return columns.token_columns(store, self.federation, shared)

    def load_emulator(self, packed: PackedBase, base: np.ndarray) -> tuple[int, PackedBase, np.ndarray]:
        """Makes and aligns an emulator of the base; returns it as `load_base` does."""
        model, tokenizer = self.federation.model, load_tokenizer(self.federation.model)
        network = map_base(packed, mapped_buffer(base, self.device)).eval()
        small = emulator_of(network, model)
        align(small, network, model, own_samples(network, tokenizer, self.federation.seed, self.device))
        small.config._name_or_path = PARTY
        hidden = replace(model, base=PARTY, revision=None, start=None, access=replace(model.access, events=()))
        index, buffer = pack(small, hidden)
        return index.nbytes, index, buffer

    def open_plug_in(self, packed: PackedBase, base: np.ndarray) -> dict[str, bytes]:
        """Maps the base, into which ends are plugged to be judged; returns the tokenizer's files."""
        model = self.federation.model
        tokenizer = load_tokenizer(model)
        trainer = self._trainer(packed, base)
        self.service = BaseService(trainer, model.access, "ends", 0, tokenizer, self._replaced)
        self.service.grant("layers")
        return tokenizer_files(tokenizer)

    def export(self, vector: np.ndarray, card: str) -> dict[str, bytes]:
        """Returns the model folder's files for ends: the whole model, or the ends alone where the base is not given."""
        trainer, model = self.service.trainer, self.federation.model
        trainer.become(borrow(vector))
        if model.access.home:
            return export_files(trainer.trainable, model, self.service.tokenizer, card)
        return ends_files(trainer.trainable, self.service.tokenizer, card)

    def open(self, packed: PackedBase, base: np.ndarray) -> Opening:
        """Maps the base; returns what clients may know of it."""
        federation, tokenizer = self.federation, load_tokenizer(self.federation.model)
        peft = federation.model.peft
        trainer = self._trainer(packed, base)
        network: Any = trainer.trainable.network
        self.service = BaseService(
            trainer, federation.model.access, peft.sent, peft.virtual_tokens, tokenizer, self._replaced
        )
        files = tokenizer_files(tokenizer)
        start, shape = trainer.trainable.initial.numpy(), tuple(network.prompt_embeddings.shape)
        return Opening(start, shape, spread_of(network), trainer.pad, network.sizes, files)

    def score(self, round_: int, candidates_CP: np.ndarray, rows: pa.RecordBatch, batch: int) -> Scores:
        """Returns the summed losses of rows behind each candidate prompt."""
        return self.service.score(round_, candidates_CP, rows, batch)

    def gradient(self, round_: int, prompt_P: np.ndarray, rows: pa.RecordBatch, batch: int) -> PromptGradient:
        """Returns the gradient of the rows' mean loss with respect to a prompt."""
        return self.service.gradient(round_, prompt_P, rows, batch)

    def write(self, round_: int, prompt_P: np.ndarray, texts: list[np.ndarray], most: list[int]) -> Texts:
        """Returns the likeliest tokens behind texts with a prompt before them."""
        return self.service.write(round_, prompt_P, texts, most)

    def judge(self, prompt_P: np.ndarray, rows: pa.RecordBatch, batch: int) -> TermSums:
        """Returns each term's sum and count on held-out rows, which no party sees."""
        return self.service.judge(prompt_P, rows, batch)

    def continuations(self, prompt_P: np.ndarray, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns samples for the report, which no party sees."""
        return self.service.continuations(prompt_P, prompts, tokens)

    def probe(self, round_: int) -> str:
        """Returns a digest of the answers to public rows, as any client could ask for them in this round."""
        return self.service.probe(round_)

    def _trainer(self, packed: PackedBase, base: np.ndarray) -> LocalTrainer:
        federation = self.federation
        model = replace(federation.model, peft=federation.model.peft.injected)
        seed = torch_seed(federation.seed, 0, -1, "initial")
        trainable = MappedBase(packed, base, model, seed, self.device).trainable
        tokenizer = load_tokenizer(federation.model)
        return LocalTrainer(trainable, padding(tokenizer, trainable.network), federation.train, tokenizer)

    def _replaced(self, base: str) -> LocalTrainer:
        model = replace(self.federation.model, base=base, revision=None)
        if load_tokenizer(model).get_vocab() != load_tokenizer(self.federation.model).get_vocab():
            raise RunError(
                f"the provider's new base {base!r} (model.access.events) has another vocabulary than "
                f"{self.federation.model.base!r}: name one of the same family"
            )
        return self._trainer(*read_base(model))
