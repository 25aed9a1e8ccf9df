"""What a slot tells of models without a round: held-out losses, the baselines, and texts. Legend: P parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
import torch

from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.config.sections import Lora
from engine.messages.wire import Sent, WireBroadcast, borrow, from_wire, joined
from engine.records.client_state import STRATEGY, ClientMemory, part
from engine.training.evaluation import ClientLoss, client_loss
from engine.training.generation import Prompt, continuations
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training
from strategies.core.protocol import Broadcast, ClientState
from strategies.core.seeds import rng, torch_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASELINE = -2  # the client number under which baselines draw their batches


class Judge:
    """The part of a slot that is asked between rounds and after them."""

    federation: Federation
    memory: ClientMemory
    tokens: Tokens
    tokenizer: PreTrainedTokenizerBase
    trainer: LocalTrainer
    device: torch.device

    def evaluate(self, chunk: list[int], params: np.ndarray | Sent, limit: int) -> list[ClientLoss]:
        """Losses of the vector `params` (P,) on at most `limit` held-out rows of each of the chunk's clients."""
        if isinstance(params, Sent):
            params = joined(params, ray.get(list(params.parts)), self.federation.seed).params.numpy()
        self._become(params)
        return [self._loss(client, limit) for client in chunk]

    def evaluate_personal(self, chunk: list[int], wire: WireBroadcast, limit: int) -> list[ClientLoss]:
        """Losses of each client's own model on at most `limit` held-out rows; none if that is the global one."""
        losses = []
        for client in chunk:
            got = self._received(client, wire)
            own = self.federation.strategy.personal(got, part(self._remembered(client, wire.round), STRATEGY))
            if own is not None:
                self.trainer.trainable.set_rank(got.rank)
                self.trainer.trainable.flat.data.copy_(own)
                losses.append(self._loss(client, limit))
        return losses

    def local_only(self, chunk: list[int], params: np.ndarray, steps: list[int]) -> list[ClientLoss]:
        """Held-out losses of models that each client trained alone, for its number of steps from `params` (P,)."""
        losses = []
        for client, own_steps in zip(chunk, steps, strict=True):
            self._train_alone(self.tokens.rows(client, "train"), params, own_steps, client)
            losses.append(self._loss(client, self.federation.evaluate.rows))
        return losses

    def centralised(self, clients: list[int], params: np.ndarray, steps: int) -> np.ndarray:
        """The vector (P,) after `steps` steps from `params` on the pooled rows of all clients."""
        rows = pa.concat_batches([self.tokens.rows(client, "train") for client in clients])
        self._train_alone(rows, params, steps, BASELINE)
        return self.trainer.trainable.flat.detach().cpu().numpy().copy()

    def _train_alone(self, rows: pa.RecordBatch, params: np.ndarray, steps: int, client: int) -> None:
        train = replace(self.federation.train, steps=steps, epochs=None)
        start, seed = borrow(params).to(self.device), self.federation.seed
        dropout = torch_seed(seed, 0, client, "dropout")
        self.trainer.train([Training(rows, start, rng(seed, 0, client, "batches"), dropout)], train)

    def generate(self, params: np.ndarray, prompts: list[Prompt], tokens: int) -> list[str]:
        """Greedy continuations by the vector `params` (P,), one per prompt."""
        self._become(params)
        network, pad = self.trainer.trainable.network, self.trainer.pad
        return continuations(network, pad, self.device, self.tokenizer, prompts, tokens)

    def _received(self, client: int, wire: WireBroadcast) -> Broadcast:
        got = from_wire(wire, self.trainer.trainable.layout, self.federation.seed)
        return replace(got, rank=self._rank(client))

    def _rank(self, client: int) -> int | None:
        """The client's own LoRA rank, if ranks are mixed."""
        peft = self.federation.model.peft
        return peft.rank_of(client, self.federation.seed) if isinstance(peft, Lora) else None

    def _remembered(self, client: int, round_: int) -> ClientState:
        return self.memory.read(client, round_) if self.federation.keeps_state else {}

    def _become(self, params: np.ndarray) -> None:
        self.trainer.trainable.set_rank(None)
        self.trainer.trainable.flat.data.copy_(borrow(params))

    def _loss(self, client: int, limit: int) -> ClientLoss:
        rows, evaluate = self.tokens.rows(client, "heldout"), replace(self.federation.evaluate, rows=limit)
        return client_loss(self.trainer, client, rows, evaluate, self.federation.seed)
