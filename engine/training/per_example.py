"""DP-SGD on a client's rows (arXiv 1607.00133, algorithm 1) with Opacus. Legend: B rows of a piece, P parameters."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config.train import Train
from engine.messages.errors import RunError
from engine.objectives.base import Term, counted
from engine.training.local_training import LocalTrainer, client_updates
from engine.training.step_loop import Progress, Training, optimizer_step, steps_of, take_steps
from strategies.core.protocol import Mask, Vector
from strategies.privacy.budget import ExamplePlan
from strategies.privacy.noise import Words, normal

KEY = 'privacy.dp.kind = "example"'
ADAPTERS = 'train adapters of linear layers alone (model.peft.kind = "lora" and targets)'
ROUNDING = 1e-2  # share of the rows' norms: above the error of TF32, below the gradient of a missed parameter


def samples(rows: int, train: Train, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields each step's rows (B,), as many steps as in `batches`: a Poisson sample of the same expected size."""
    probability = expected_size(rows, train) / rows
    for _ in range(steps_of(rows, train)):
        yield np.flatnonzero(rng.random(rows) < probability)


def expected_size(rows: int, train: Train) -> int:
    """Returns the mean number of rows of a sample."""
    return min(rows, train.batch * train.accumulate)


class PrivateTrainer:
    """Trains one client at a time with example-level privacy. A backend of the step loop, and a Trainer.

    A step takes a Poisson sample of the rows. A row's gradient is that of its mean loss over its learned tokens, on the
    parameters in the training's `trained_mask` (None: all P), and is clipped to the L2 norm `plan.clip`. Their sum plus
    N(0, (z clip)^2) on each of these is divided by the expected size of the sample, because the true size is
    private; an empty sample is a step of noise alone. The correction and the optimizer work on this private gradient.
    `train.clip` is ignored: it would not harm privacy, but the mean's norm is mostly noise, which would shrink steps.

    `words` is the client's source of noise. Epsilon does not cover the metrics (the loss and numbers of tokens) and the
    number of rows. The rows' gradients take P floats for each of `train.batch` rows.
    """

    lanes = 1
    batches = staticmethod(samples)
    summed = staticmethod(float)  # there is one rank
    clip = staticmethod(lambda norm: None)  # ignores `train.clip`
    train = take_steps
    updates = client_updates

    def __init__(self, plain: LocalTrainer, plan: ExamplePlan, words: Words) -> None:
        """RunError if Opacus is missing or trained parameters are tied."""
        _hook_class()
        _refuse_ties(plain.trainable.network)
        self.plain, self.plan, self.words = plain, plan, words
        self.trainable, self.objective, self.optimizer = plain.trainable, plain.objective, plain.optimizer
        self.device, self.correct = plain.device, plain.correct
        self.context = replace(plain.context, every_logit=True)
        self.become, self.loss_terms, self.generate = plain.become, plain.loss_terms, plain.generate
        self.step_means = plain.step_means
        self.trained_mask: Mask | None = None  # of the training that `begin` was given, and whether it should move
        self.moving = False

    def prepared(self, active: list[Progress]) -> AbstractContextManager[None]:
        """Makes backward leave each row's gradient."""
        return row_gradients(self.trainable.network)

    def begin(self, lane: int, training: Training) -> None:
        """Puts the start into the model."""
        self.trained_mask = None if training.trained_mask is None else training.trained_mask.to(self.device)
        self.moving = False
        self.plain.begin(lane, training)

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Computes the private gradient of the client's next step; RunError if Opacus misses a row's gradient."""
        (client,) = active
        (rows,), grad = self.plain.sampler.next_rows(active, train), self.trainable.grad
        summed = torch.zeros_like(grad)
        for first in range(0, rows.num_rows, train.batch):
            piece = self.objective.collate(rows.slice(first, train.batch), self.plain.pad)
            client.count(counted(self.objective, [piece]), piece.tokens)
            # Opacus tells sequences apart by the first dimension of a layer's input.
            (piece,) = self.plain.with_columns([piece], client.training.reference, every_logit=True)
            terms = self.objective.terms(self.trainable.network, piece.to(self.device), self.context)
            by_row = {name: Term(term.values_N, term.row_N // piece.group) for name, term in terms.items()}
            self._add_clipped(by_row, len(piece.ids_BT) // piece.group, piece.group, summed)
            client.add({name: term.total() for name, term in terms.items()})
        self._add_noise(summed)
        grad.copy_(summed / expected_size(client.training.rows.num_rows, train))

    def step(self, adjust: Callable[[], None]) -> None:
        """Takes the optimizer's step."""
        optimizer_step(self, adjust)
        self.moving |= self.optimizer.param_groups[0]["lr"] > 0 and bool(self.trainable.grad.any())

    def end(self, lane: int, training: Training) -> Vector:
        """Returns the vector as `LocalTrainer.end` does; RuntimeError if gradients have moved no weight."""
        if self.moving and torch.equal(self.trainable.flat.data, training.start):
            raise RuntimeError(
                "private steps moved no weight, although their gradients are not zero: the model is cut off from the "
                "vector that is trained, or train.optimizer.lr is too small for float32"
            )
        return self.plain.end(lane, training)

    def _add_clipped(self, terms: dict[str, Term], rows: int, group: int, summed: torch.Tensor) -> None:
        """Adds the clipped gradients of a piece's rows, each of `group` sequences, to `summed` (P,)."""
        layout, grad = self.trainable.layout, self.trainable.grad.zero_()
        # A row's loss is the sum of its terms' means. Clipping below divides by the first term's count, so that no
        # row's gradient depends on another's count.
        first, *others = (terms[name] for name in self.objective.losses)
        count_B = first.counts_by_row(rows).clamp(min=1)
        loss = first.total()
        for term in others:
            loss = loss + (term.by_row(rows) * count_B / term.counts_by_row(rows).clamp(min=1)).sum()
        loss.backward()
        each, of_all = self._each_row(rows, group), layout.views(grad)
        norms_B = _norms(each)
        finite_B = norms_B.isfinite()
        if finite_B.all():
            # Autograd's sum of the same gradients shows whether Opacus has seen every use of every parameter.
            missed = torch.stack([(per_row.sum(0) - of_all[name]).norm() for name, per_row in each.items()]).norm()
            if missed > ROUNDING * norms_B.sum():
                raise RunError(
                    f"{KEY} needs each row's own gradient, but those that Opacus gives for this model do not sum up "
                    f"to the gradient: {ADAPTERS}, or take another model.base"
                )
        else:  # a row without a finite gradient adds nothing, because NaN or infinity would reveal it
            for per_row in each.values():
                per_row[~finite_B] = 0
        if self.trained_mask is not None:
            for name, view in layout.views(self.trained_mask).items():
                each[name] *= view
            norms_B = _norms(each)
        factor_B = torch.where(finite_B, (self.plan.clip * count_B / norms_B).clamp(max=1) / count_B, 0)
        for name, view in layout.views(summed).items():
            view += torch.tensordot(factor_B, each[name], 1)

    def _each_row(self, rows: int, group: int) -> dict[str, torch.Tensor]:
        """Takes each trained tensor's gradients (B, ...) of the rows' summed losses, by the layout's names."""
        trained = {name: p for name, p in self.trainable.network.named_parameters() if p.requires_grad}
        each = {name: vars(parameter)["grad_sample"] for name, parameter in trained.items()}
        for parameter in trained.values():
            vars(parameter)["grad_sample"] = None  # or the next piece's would follow in a list
        for name, per_row in each.items():
            if not isinstance(per_row, torch.Tensor) or per_row.shape != (rows * group, *trained[name].shape):
                raise RunError(
                    f"{KEY} needs each row's own gradient, which Opacus does not give for {name} of this model: "
                    f"{ADAPTERS}, or take another model.base"
                )
        return (
            {name: per_row.unflatten(0, (rows, group)).sum(1) for name, per_row in each.items()} if group > 1 else each
        )

    def _add_noise(self, summed: torch.Tensor) -> None:
        """Adds the plan's noise to the trained coordinates of `summed` (P,) that a client of this LoRA rank has."""
        z, lora_rank = self.plan.noise_multiplier, self.trainable.lora_rank
        if z > 0:
            count = len(summed) if self.trained_mask is None else int(self.trained_mask.sum())
            noise = torch.from_numpy(normal(self.words, count)).float().to(summed.device)
            if self.trained_mask is None:
                summed.add_(noise, alpha=z * self.plan.clip)
            else:
                summed[self.trained_mask] += noise * (z * self.plan.clip)
        if lora_rank is not None:
            for pair in self.trainable.layout.lora_pairs(summed):
                pair.a_RI[lora_rank:] = 0
                pair.b_OR[:, lora_rank:] = 0


def _norms(each: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the L2 norms (B,) of the rows' gradients."""
    norms_NB = torch.stack([rows.flatten(1).norm(dim=1) for rows in each.values()])
    norms_B: torch.Tensor = torch.linalg.vector_norm(norms_NB, dim=0)
    return norms_B


@contextmanager
def row_gradients(network: nn.Module) -> Iterator[None]:
    """Makes backward leave each row's gradient in `grad_sample` of the trained parameters; cleans up afterwards."""
    hooks = _hook_class()(network, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # About the first layers, whose input needs no gradient; their rows' gradients are right.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            yield
    finally:
        hooks.cleanup()
        for module in network.modules():  # `cleanup` forgets these, which hold a batch after an error
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)


def _hook_class() -> Any:
    try:
        from opacus.grad_sample import GradSampleHooks  # an extra, and the import takes a second
    except ImportError:
        why = f'{KEY} needs the library Opacus, which is not installed: pip install "fedpost[opacus]"'
        raise RunError(why) from None
    return GradSampleHooks


def _refuse_ties(network: nn.Module) -> None:
    """Raises RunError if a trained parameter has two names, because its gradient then comes from two layers."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and first.setdefault(parameter, name) != name:
            raise RunError(
                f"{KEY} needs each row's own gradient, which is not supported for tied parameters, and {name} is "
                f"{first[parameter]}: {ADAPTERS}, or take a model.base whose embeddings are not tied"
            )
