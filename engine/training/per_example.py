"""DP-SGD on a client's rows (Abadi et al. 2016, arXiv 1607.00133, algorithm 1), by the rows' gradients of Opacus.

Legend: B rows of a piece, P parameters.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from engine.config.train import Train
from engine.models.base_model import Trainable
from engine.objectives import Objectives
from engine.objectives.sft import IGNORED, Batch
from engine.training.batching import steps_of
from engine.training.local_training import Correct, LocalTrainer, Trained, Training
from engine.training.optimizers import make_optimizer
from strategies.core.protocol import Mask
from strategies.privacy.noise_source import Words, normal
from strategies.privacy.per_example import ExamplePlan

KEY = 'privacy.dp.kind = "example"'
ADAPTERS = 'train adapters instead (model.peft.kind = "lora")'
ROUNDING = 1e-2  # of the rows' norms: above what TF32 rounds off, below what a parameter that was forgotten lacks


@dataclass
class PrivateTrainer(LocalTrainer):
    """A LocalTrainer whose vectors tell little about any one row: steps along clipped gradients, summed, plus noise.

    A step is on a Poisson sample of the rows. A row's gradient is that of its mean loss over its learnt tokens, over
    the parameters that are `live` in the training (None: all P), and clipped to the L2 norm `plan.clip`. Their sum plus
    N(0, (z clip)^2) in each of these is divided by the expected
    size of the sample, since the true one is private; an empty sample is a step of noise alone. What follows works on a
    gradient that is private already: the strategy's correction and the optimizer. `train.clip` is left out: it would do
    no harm to privacy, but the mean's norm is mostly the noise's, and the step would shrink by it.

    The caller puts the source of noise into `words` before each client. Outside epsilon are the metrics (of the loss
    and of numbers of tokens) and the number of rows. Rows' gradients take P floats for each of `train.batch` rows.
    """

    plan: ExamplePlan
    words: Words | None = None
    live: Mask | None = None

    @classmethod
    def with_plan(
        cls, trainable: Trainable, objective: Objectives, pad: int, train: Train, plan: ExamplePlan
    ) -> "PrivateTrainer":
        """As `of`, under a plan; ValueError without Opacus, or where trained parameters are tied."""
        _hooks()
        _refuse_ties(trainable.network)
        # Opacus tells rows apart by the first dimension of what goes into a layer.
        objective = replace(objective, every_logit=True)
        return cls(trainable, objective, pad, make_optimizer([trainable.flat], train.optimizer), plan)

    def train(self, trainings: list[Training], train: Train) -> list[Trained]:
        """Does one training after the other, each with its own live coordinates."""
        done = []
        for training in trainings:
            self.live = None if training.live is None else training.live.to(self.device)
            done += super().train([training], train)
        return done

    def steps(
        self,
        rows: pa.RecordBatch,
        start: torch.Tensor,
        train: Train,
        stream: np.random.Generator,
        correct: Correct | None = None,
        rate: float = 1.0,
    ) -> dict[str, float]:
        """Private optimizer steps from the vector `start` (P,), left in `trainable.flat`; returns the metrics.

        As those of LocalTrainer; `loss` is over the sampled rows, and 0 beside `learnt` 0 where every sample was empty.
        Raises ValueError where Opacus does not give every row's gradient of every parameter, RuntimeError where a
        gradient moves nothing.
        """
        flat, grad = self.trainable.flat, self.trainable.grad
        flat.data.copy_(start)
        self.trainable.network.train()
        nll_total, token_total, steps, trained_tokens, rates, moving = 0.0, 0, 0, 0, 0.0, False
        total = steps_of(rows.num_rows, train)
        with row_gradients(self.trainable.network) as hooks:
            for picked in samples(rows.num_rows, train, stream):
                summed = torch.zeros_like(grad)
                for first in range(0, len(picked), train.batch):
                    piece = self.objective.collate(rows.take(picked[first : first + train.batch]), self.pad)
                    nll_total += self._add_clipped(piece.to(flat.device), summed, hooks)
                    token_total += piece.learnt
                    trained_tokens += piece.tokens
                self._add_noise(summed)
                grad.copy_(summed / expected_size(rows.num_rows, train))
                if correct is not None:
                    correct(grad[None], flat.data[None])
                lr = train.optimizer.lr * rate * train.over_steps.factor(steps, total)
                self.optimizer.param_groups[0]["lr"] = lr
                self.optimizer.step()
                moving |= lr > 0 and bool(grad.any())
                steps, rates = steps + 1, rates + lr
        if moving and torch.equal(flat.data, start):
            raise RuntimeError(
                f"{steps} private steps moved no weight, although their gradients are not zero: the model is cut off "
                f"from the vector that is trained, or train.optimizer.lr is too small for float32"
            )
        return {
            "loss": nll_total / token_total if token_total else 0.0,
            "rows": float(rows.num_rows),
            "steps": float(steps),
            "tokens": float(trained_tokens),
            "learnt": float(token_total),
            "rates": rates,
        }

    def _add_clipped(self, piece: Batch, summed: torch.Tensor, hooks: Any) -> float:
        """Adds the piece's clipped gradients to `summed` (P,); returns its summed loss in nats."""
        grad, layout = self.trainable.grad, self.trainable.layout
        grad.zero_()
        nll, _ = self.objective.loss(self.trainable.network, piece)
        nll.backward()  # of the sum, so that no row's gradient depends on another's number of tokens
        each = self._each_row(len(piece.ids_BT))
        learnt_B = (piece.labels_BT[:, 1:] != IGNORED).sum(1).clamp(min=1)
        norms_B = _norms(each)
        finite_B = norms_B.isfinite()
        if finite_B.all():
            # Autograd's own sum of the same gradients tells whether Opacus has seen every use of every parameter.
            ours, whole = each.items(), layout.views(grad)
            missed = torch.stack([(rows.sum(0) - whole[name]).norm() for name, rows in ours]).norm()
            if missed > ROUNDING * norms_B.sum():
                raise ValueError(
                    f"{KEY} needs each row's own gradient, but those that Opacus gives for this model do not sum up "
                    f"to the gradient: {ADAPTERS}, or take another model.base"
                )
        else:  # such a row moves the sum by nothing, where infinity or NaN would tell of it
            for rows in each.values():
                rows[~finite_B] = 0
        if self.live is not None:
            for name, view in layout.views(self.live).items():
                each[name] *= view
            norms_B = _norms(each)
        factor_B = torch.where(finite_B, (self.plan.clip * learnt_B / norms_B).clamp(max=1) / learnt_B, 0)
        for name, view in layout.views(summed).items():
            view += torch.tensordot(factor_B, each[name], 1)
        hooks.set_grad_sample_to_none()
        return nll.item()

    def _each_row(self, count: int) -> dict[str, torch.Tensor]:
        """Each trained tensor's gradients (B, ...) of the rows' summed losses, by the layout's names."""
        each = {}
        for name, parameter in self.trainable.network.named_parameters():
            if parameter.requires_grad:
                rows = vars(parameter)["grad_sample"]
                if not isinstance(rows, torch.Tensor) or rows.shape != (count, *parameter.shape):
                    raise ValueError(
                        f"{KEY} needs each row's own gradient, which Opacus does not give for {name} of this model: "
                        f"{ADAPTERS}, or take another model.base"
                    )
                each[name] = rows
        return each

    def _add_noise(self, summed: torch.Tensor) -> None:
        """Adds the plan's noise to the live coordinates of `summed` (P,) that a client of this rank has."""
        z, rank = self.plan.noise_multiplier, self.trainable.rank
        if z > 0:
            assert self.words is not None, "the source of noise is set before each client"
            count = len(summed) if self.live is None else int(self.live.sum())
            noise = torch.from_numpy(normal(self.words, count)).float().to(summed.device)
            if self.live is None:
                summed.add_(noise, alpha=z * self.plan.clip)
            else:
                summed[self.live] += noise * (z * self.plan.clip)
        if rank is not None:
            for pair in self.trainable.layout.lora_pairs(summed):
                pair.a_RI[rank:] = 0
                pair.b_OR[:, rank:] = 0


def _norms(each: dict[str, torch.Tensor]) -> torch.Tensor:
    """The L2 norms (B,) of the rows' gradients."""
    norms_NB = torch.stack([rows.flatten(1).norm(dim=1) for rows in each.values()])
    norms_B: torch.Tensor = torch.linalg.vector_norm(norms_NB, dim=0)
    return norms_B


def samples(rows: int, train: Train, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers (B,) of each step: a Poisson sample, which has each row by itself with the same probability.

    That is `train.batch` * `train.accumulate` / rows, at most 1. There are as many steps as in `batches`.
    """
    probability = expected_size(rows, train) / rows
    for _ in range(steps_of(rows, train)):
        yield np.flatnonzero(rng.random(rows) < probability)


def expected_size(rows: int, train: Train) -> int:
    """How many rows a sample has on average."""
    return min(rows, train.batch * train.accumulate)


@contextmanager
def row_gradients(network: nn.Module) -> Iterator[Any]:
    """Makes backward leave each row's gradient in `grad_sample` of the trained parameters; no trace of it stays."""
    hooks = _hooks()(network, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # Of the first layers, whose input needs no gradient; their rows' gradients are right all the same.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            yield hooks
    finally:
        hooks.cleanup()
        for module in network.modules():  # which `cleanup` forgets: after an error they hold a batch
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)


def _hooks() -> Any:
    try:
        from opacus.grad_sample import GradSampleHooks  # here, since it is an extra and takes a second
    except ImportError:
        raise ValueError(
            f'{KEY} needs the library Opacus, which is not installed: pip install "fedpost[opacus]"'
        ) from None
    return GradSampleHooks


def _refuse_ties(network: nn.Module) -> None:
    """Raises ValueError if a trained parameter has two names: its gradients come from two layers at once."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and first.setdefault(parameter, name) != name:
            raise ValueError(
                f"{KEY} needs each row's own gradient, which is not supported for tied parameters, and {name} is "
                f"{first[parameter]}: {ADAPTERS}, or take a model.base whose embeddings are not tied"
            )
