"""The recipe's section on local training: optimizer, schedules, steps."""

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field

from engine.messages.checks import at_least, below_one
from engine.messages.errors import RunError
from engine.objectives import Objectives
from engine.objectives.sft import Sft

BY_KIND = Field(discriminator="kind") if get_args(Objectives) else Field()  # a union of one has no members
NEEDS_MORE = {"LBFGS", "SparseAdam", "Muon"}  # a closure, sparse gradients, matrices: a flat vector has none of them
OTHERS = set(torch.optim.__all__) - {"Optimizer", *NEEDS_MORE}  # modules and functions among them
OPTIMIZERS = tuple(name for name in sorted(OTHERS) if isinstance(vars(torch.optim)[name], type))
DECAYS = ("weight_decay", "lambd")  # options that shrink parameters whatever their gradients are


@dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101), fused."""

    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        at_least("train.optimizer", 0, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        below_one("train.optimizer", **{"betas[0]": self.betas[0], "betas[1]": self.betas[1]})


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with optional momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        at_least("train.optimizer", 0, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class TorchOptimizer:
    """Any other optimizer of `torch.optim` by its class name, with its own keyword arguments in `options`."""

    kind: Literal["torch"] = "torch"
    name: str
    lr: float = 1e-3
    options: dict[str, float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("train.optimizer", 0, lr=self.lr)
        if self.name not in OPTIMIZERS:
            near, known = difflib.get_close_matches(self.name, OPTIMIZERS, 1, 0.0)[0], ", ".join(OPTIMIZERS)
            raise RunError(f"train.optimizer.name is {self.name!r}; did you mean {near!r}? There is {known}")
        taken = self._parameters.keys() - {"params", "lr"}
        for option in self.options.keys() - taken:
            raise RunError(f"torch.optim.{self.name} has no option {option!r}; it takes {', '.join(sorted(taken))}")

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(getattr(torch.optim, self.name)).parameters

    def option(self, name: str) -> float | bool:
        """The value of an option, torch's own where the recipe gives none; 0 if the optimizer does not have it."""
        default = self._parameters[name].default if name in self._parameters else 0.0
        return self.options.get(name, default)


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate: linear from 0 to 1 over `warmup`, then constant, or falling to `end`."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    end: float = 0.0

    def factor(self, at: int, total: int) -> float:
        """The factor at round or step `at` (from 0) of `total`; `total` itself would have `end`."""
        if at < self.warmup:
            return (at + 1) / self.warmup
        progress = min(1.0, (at - self.warmup) / max(1, total - self.warmup))
        fall = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[self.kind]
        return 1 - (1 - self.end) * fall


@dataclass(frozen=True)
class Train:
    """A client's work in a round: `steps` optimizer steps, or `epochs` passes over its rows.

    A step takes `batch` * `accumulate` rows, `batch` of them through the model at once; rows are cut to `max_length`
    tokens. `clip` bounds the gradient's L2 norm; 0 does not. `over_rounds` and `over_steps` (of one round) are factors
    on the learning rate. `state`: the optimizer's state starts afresh for each client and round ("reset"), or each
    client keeps its own from round to round ("keep"). `dtype` is what forward and backward passes compute in, without
    it the base's own; vectors, optimizer and sums are float32.
    """

    objective: Annotated[Objectives, BY_KIND] = field(default_factory=Sft)
    optimizer: Annotated[AdamW | Sgd | TorchOptimizer, Field(discriminator="kind")] = field(default_factory=AdamW)
    over_rounds: Schedule = field(default_factory=Schedule)
    over_steps: Schedule = field(default_factory=Schedule)
    state: Literal["reset", "keep"] = "reset"
    steps: int | None = None
    epochs: int | None = None
    batch: int = 8
    accumulate: int = 1
    max_length: int = 256
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RunError("train needs exactly one of steps and epochs")
        at_least("train", 1, steps=self.steps, epochs=self.epochs, batch=self.batch, accumulate=self.accumulate)
        at_least("train", 2, max_length=self.max_length)
        at_least("train", 0, clip=self.clip)
        at_least("train.over_rounds", 0, warmup=self.over_rounds.warmup, end=self.over_rounds.end)
        at_least("train.over_steps", 0, warmup=self.over_steps.warmup, end=self.over_steps.end)
