"""A client's local training, free of Ray: from the global vector to an update. Legend: P parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from engine.batches import batches, steps_of
from engine.memory import OPTIMIZER, STRATEGY, named, part
from engine.model import Trainable
from engine.objectives import Objectives
from engine.optimizers import kept, make_optimizer, reset, restore
from engine.settings import Federation
from engine.train_settings import Train
from strategies.seeds import rng, torch_seed
from strategies.types import GLOBAL, Broadcast, Memory, Strategy, Update, Vector

Correct = Callable[[torch.Tensor, torch.Tensor], None]


class Trainer(ABC):
    """One model and one optimizer that become client after client; of a gang's rank, vectors are its shards."""

    optimizer: torch.optim.Optimizer

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the vector lies."""

    @abstractmethod
    def weights(self) -> Vector:
        """A copy of the present vector (P,)."""

    @abstractmethod
    def set_rank(self, rank: int | None) -> None:
        """Becomes a client whose adapters have this rank; None: as the recipe says."""

    @abstractmethod
    def steps(
        self,
        rows: pa.RecordBatch,
        start: torch.Tensor,
        train: Train,
        stream: np.random.Generator,
        correct: Correct | None = None,
        rate: float = 1.0,
    ) -> dict[str, float]:
        """Local optimizer steps from the vector `start` (P,), which stay in the model; returns the metrics.

        `correct` may change the gradient of each step, `rate` is a factor on all learning rates.
        """

    @abstractmethod
    def mean_loss(self, rows: pa.RecordBatch, vector: torch.Tensor, batch: int) -> float:
        """The mean loss of the vector (P,) over all of a client's encoded rows, in nats per token."""

    def update(
        self, client: int, rows: pa.RecordBatch, weight: float, got: Broadcast, memory: Memory, federation: Federation
    ) -> tuple[Update, Memory]:
        """Trains on a client's encoded rows from `got` and returns what its strategy makes of it, and its memory.

        Metrics: `loss` in nats is the mean over the `learnt` tokens, each judged before its step; `tokens` counts
        prompts too, `rows` the client's rows, `steps` the optimizer's steps, `rates` their learning rates' sum.
        """
        strategy, train, seed = federation.strategy, federation.train, federation.seed
        device = self.device
        got, own = _on(device, got), {name: tensor.to(device) for name, tensor in part(memory, STRATEGY).items()}
        self.set_rank(got.rank)
        metrics = {"loss_before": self.mean_loss(rows, got.params, train.batch)} if strategy.loss_before else {}
        ends: dict[str, Vector] = {}
        moments: Memory = {}
        for run, start in strategy.starts(got, own).items():
            stream = rng(seed, got.round, client, "batches" if run == GLOBAL else "personal")
            torch.manual_seed(torch_seed(seed, got.round, client, "dropout"))
            correct = _corrected_by(strategy, got, own, run)
            rate = train.over_rounds.factor(got.round, federation.rounds)
            if train.state == "keep":
                restore(self.optimizer, part(memory, f"{OPTIMIZER}{run}."))
            else:
                reset(self.optimizer)
            found = self.steps(rows, start, train, stream, correct, rate)
            if train.state == "keep":
                moments |= named(kept(self.optimizer), f"{OPTIMIZER}{run}.")
            if run == GLOBAL:
                metrics |= found
            ends[run] = self.weights()
        delta = (ends.pop(GLOBAL) - got.params).cpu()
        on_cpu = {name: end.cpu() for name, end in ends.items()}
        own = part(memory, STRATEGY)
        update, own = strategy.finish(Update(client, weight, delta, metrics=metrics), _on("cpu", got), own, on_cpu)
        return update, named(own, STRATEGY) | moments


@dataclass
class LocalTrainer(Trainer):
    """The whole model in one process."""

    trainable: Trainable
    objective: Objectives
    pad: int
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, trainable: Trainable, objective: Objectives, pad: int, train: Train) -> "LocalTrainer":
        """The optimizer works on the flat vector, which is one tensor to it: fast, and reset by zeroing."""
        return cls(trainable, objective, pad, make_optimizer([trainable.flat], train.optimizer))

    @property
    def device(self) -> torch.device:
        """Where the vector lies."""
        return self.trainable.flat.device

    def weights(self) -> Vector:
        """A copy of the present vector (P,)."""
        return self.trainable.flat.detach().clone()

    def set_rank(self, rank: int | None) -> None:
        """Becomes a client whose adapters have this rank; None: as the recipe says."""
        self.trainable.set_rank(rank)

    def steps(
        self,
        rows: pa.RecordBatch,
        start: torch.Tensor,
        train: Train,
        stream: np.random.Generator,
        correct: Correct | None = None,
        rate: float = 1.0,
    ) -> dict[str, float]:
        """Local optimizer steps from the vector `start` (P,), left in `trainable.flat`; returns the metrics.

        `correct` may change the gradient of each step, `rate` is a factor on all learning rates.
        """
        flat, grad, network = self.trainable.flat, self.trainable.grad, self.trainable.network
        flat.data.copy_(start)
        network.train()
        nll_total, token_total, steps, trained_tokens, rates = 0.0, 0, 0, 0, 0.0
        total = steps_of(rows.num_rows, train)
        for picked in batches(rows.num_rows, train, stream):
            grad.zero_()
            pieces = [
                self.objective.collate(rows.take(picked[first : first + train.batch]), self.pad).to(flat.device)
                for first in range(0, len(picked), train.batch)
            ]
            learnt = sum(piece.learnt for piece in pieces)
            for piece in pieces:
                nll, _ = self.objective.loss(network, piece)
                (nll / learnt).backward()
                nll_total += nll.item()
                trained_tokens += int(piece.attention_BT.sum())
            if correct is not None:
                correct(grad[None], flat.data[None])
            if train.clip > 0:
                torch.nn.utils.clip_grad_norm_([flat], train.clip)
            lr = train.optimizer.lr * rate * train.over_steps.factor(steps, total)
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            token_total, steps, rates = token_total + learnt, steps + 1, rates + lr
        return {
            "loss": nll_total / token_total,
            "rows": float(rows.num_rows),
            "steps": float(steps),
            "tokens": float(trained_tokens),
            "learnt": float(token_total),
            "rates": rates,
        }

    @torch.no_grad()
    def mean_loss(self, rows: pa.RecordBatch, vector: torch.Tensor, batch: int) -> float:
        """The mean loss of the vector (P,) over all of a client's encoded rows, in nats per token."""
        self.trainable.flat.data.copy_(vector)
        self.trainable.network.eval()
        nll_total, token_total = 0.0, 0
        for first in range(0, rows.num_rows, batch):
            piece = self.objective.collate(rows.slice(first, batch), self.pad).to(vector.device)
            nll, learnt = self.objective.loss(self.trainable.network, piece)
            nll_total, token_total = nll_total + nll.item(), token_total + learnt
        return nll_total / token_total


def _corrected_by(strategy: Strategy, got: Broadcast, memory: Memory, run: str) -> Correct:
    return lambda grad_KP, params_KP: strategy.correct(grad_KP, params_KP, got, memory, run)


def _on(device: torch.device | str, got: Broadcast) -> Broadcast:
    extras = {name: extra.to(device) for name, extra in got.extras.items()}
    return replace(got, params=got.params.to(device), extras=extras)
