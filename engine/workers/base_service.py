"""What the owner of a base does for clients that do not have it. Legend: C candidates, P numbers of a prompt.

Each call is checked against the level of its round, whatever the caller says it may do.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.config.access import Access, Terms
from engine.messages.errors import AccessDenied, BaseRemoved
from engine.messages.exposure import PromptGradient, Scores, Texts, Usage
from engine.messages.shards import borrow
from engine.objectives.base import Prompt, TermSums, Tokenizer
from engine.objectives.token_batch import Batch, lengths, token_losses
from engine.training.local_training import LocalTrainer
from engine.training.searching import greedy, losses
from strategies.core.access import GRANTS, Capability, lowest
from strategies.core.seeds import rng

PROBE_ROWS, PROBE_TOKENS = 8, 16


@dataclass
class BaseService:
    """Answers by `trainer`, which has the base; `sent` is "prompt" (words) or "vector", `places` a prompt's length.

    `load` makes the trainer of another base, which takes the first one's place.
    """

    trainer: LocalTrainer
    access: Access
    sent: str
    places: int
    tokenizer: Tokenizer
    load: Callable[[str], LocalTrainer]
    others: dict[str, LocalTrainer] = field(default_factory=dict)

    def score(self, round_: int, candidates_CP: np.ndarray, rows: pa.RecordBatch, batch: int) -> Scores:
        """Words need the capability "score", vectors "inject"."""
        terms = self._granted(round_, "score" if self.sent == "prompt" else "inject")
        losses_C, units = losses(self._trainer(terms), rows, borrow(candidates_CP), batch)
        losses_C = losses_C + units * _jitter(terms.nats, len(losses_C))
        read = len(candidates_CP) * (self.places * rows.num_rows + int(lengths(rows).sum()))
        return Scores(losses_C, units, _usage(terms, read, 0))

    def gradient(self, round_: int, prompt_P: np.ndarray, rows: pa.RecordBatch, batch: int) -> PromptGradient:
        """Needs the capability "input_gradients"."""
        terms = self._granted(round_, "input_gradients")
        trainer = self._trainer(terms)
        trainer.become(borrow(prompt_P))
        trainer.trainable.network.eval()
        sums = dict[str, float]()

        def add(totals: Mapping[str, Any]) -> None:
            for name, total in totals.items():
                sums[name] = sums.get(name, 0.0) + total.item()

        counts, tokens = trainer.step_gradient(rows, batch, add)
        gradient_P = trainer.trainable.grad.cpu().numpy().copy()
        usage = _usage(terms, self.places * rows.num_rows + tokens, 0)
        return PromptGradient(gradient_P, sums, dict(counts), tokens, usage)

    def write(self, round_: int, prompt_P: np.ndarray, texts: list[np.ndarray], most: list[int]) -> Texts:
        """Needs the capability "generate", and vectors "inject" too."""
        terms = self._granted(round_, "generate")
        if self.sent == "vector":
            self._granted(round_, "inject")
        ids = greedy(self._trainer(terms), borrow(prompt_P), texts, most)
        read = self.places * len(texts) + sum(map(len, texts))
        return Texts(ids, _usage(terms, read, sum(map(len, ids))))

    @torch.no_grad()
    def probe(self, round_: int) -> str:
        """Returns a digest of the losses of public tokens, or of texts behind them where there are no scores."""
        terms = self.access.in_round(round_)
        if terms.removed is not None:
            return f"removed in round {terms.removed}"
        trainer = self._trainer(terms)
        network: Any = trainer.trainable.network.eval()
        tokens = len(network.get_input_embeddings().weight)
        ids_BT = rng(0, 0, -1, "probe").integers(tokens, size=(PROBE_ROWS, PROBE_TOKENS))
        trainer.become(trainer.trainable.initial)
        if "score" in GRANTS[terms.level]:
            sizes, learned = np.full(PROBE_ROWS, PROBE_TOKENS), np.ones(ids_BT.size, bool)
            batch = Batch.padded(ids_BT.reshape(-1), learned, sizes, trainer.pad).to(trainer.device)
            answer = token_losses(network, batch).cpu().numpy() + _jitter(terms.nats, PROBE_ROWS)[0]
        else:
            texts = greedy(trainer, trainer.trainable.initial, [*ids_BT], [PROBE_TOKENS] * PROBE_ROWS)
            answer = np.concatenate(texts)
        return sha256(answer.tobytes()).hexdigest()

    def grant(self, needed: Capability) -> None:
        """Raises AccessDenied if the level before the first round does not grant a capability."""
        self._granted(0, needed)

    def judge(self, prompt_P: np.ndarray, rows: pa.RecordBatch, batch: int) -> TermSums:
        """Judges by the recipe's base, whatever its owner has done since."""
        self.trainer.become(borrow(prompt_P))
        return self.trainer.loss_terms(rows, batch)

    def continuations(self, prompt_P: np.ndarray, prompts: list[Prompt], tokens: int) -> list[str]:
        """Writes by the recipe's base."""
        self.trainer.become(borrow(prompt_P))
        return self.trainer.generate(self.tokenizer, prompts, tokens)

    def _granted(self, round_: int, needed: Capability) -> Terms:
        """Returns the terms of a round; AccessDenied if they do not grant this, BaseRemoved if nothing is left."""
        terms = self.access.in_round(round_)
        if terms.removed is not None:
            raise BaseRemoved(
                f"the provider removed the base in round {terms.removed} (model.access.events), and clients have no "
                f"copy of it: what they hold of the rounds before is in the run folder's checkpoints"
            )
        if needed not in GRANTS[terms.level]:
            raise AccessDenied(
                f'in round {round_} a client asked for "{needed}", which the level "{terms.level}" of model.access '
                f'does not grant ("{lowest({needed})}" is the lowest that does)'
            )
        return terms

    def _trainer(self, terms: Terms) -> LocalTrainer:
        if terms.base is None:
            return self.trainer
        if terms.base not in self.others:
            self.others[terms.base] = self.load(terms.base)
        return self.others[terms.base]


def _jitter(nats: float, count: int) -> np.ndarray:
    """Returns normal numbers that nobody can draw again; zeros for no nats."""
    if not nats:
        return np.zeros(count)
    return np.random.default_rng(int.from_bytes(os.urandom(8), "big")).normal(0.0, nats, count)


def _usage(terms: Terms, read: int, written: int) -> Usage:
    return Usage(read, written, math.nan if terms.price is None else terms.price.cost(read, written))
