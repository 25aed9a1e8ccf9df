"""Optimizers on the server, with the mean change D = sum_k p_k delta_k as their gradient. All of them read the sum.

FedAvgM is momentum (Hsu et al. 2019, arXiv 1909.06335); DiLoCo is Nesterov's (Douillard et al. 2023, arXiv 2311.08105);
FedAdagrad, FedAdam and FedYogi are algorithm 2 of FedOpt (Reddi et al. 2021, arXiv 2003.00295).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Decay, ServerLr
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Vector
from strategies.core.ranges import ABOVE_0, Range


@dataclass(frozen=True)
class MomentumRule(AveragingRule, ABC):
    """m = momentum m + D, and a step along m or, with `nesterov`, along D + momentum m."""

    momentum: Decay = 0.9
    nesterov: ClassVar[bool] = False
    zero_moments: ClassVar[tuple[str, ...]] = ("m",)

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """m = momentum m + D, theta += lr m, or lr (D + momentum m)."""
        mean = aggregate.total / aggregate.weight
        m = self.momentum * state.moments["m"] + mean
        change = mean + self.momentum * m if self.nesterov else m
        return replace(state, round=state.round + 1, params=state.params + self.lr * change, moments={"m": m})


@dataclass(frozen=True)
class FedAvgM(MomentumRule):
    """m = momentum m + D, theta += lr m.

    Trap: m is a sum, not an average. A steady D moves theta by D lr / (1 - momentum) a round, 10 D with the defaults.
    """

    kind: Literal["fedavgm"] = "fedavgm"
    paper: ClassVar[str] = "arXiv 1909.06335"


@dataclass(frozen=True)
class DiLoCo(MomentumRule):
    """m = momentum m + D, theta += lr (D + momentum m), D = the clients' mean change: algorithm 1. Reads the sum.

    The outer step is that of torch.optim.SGD with nesterov on the gradient -D. Algorithm 1 averages plainly, hence
    `weighting` "uniform". The paper's clients keep their AdamW state from round to round: set train.state = "keep", or
    this is FedAvg with Nesterov momentum. Traps: it is made for a few clients that take part in every round, with
    hundreds of local steps; a client that is rarely sampled keeps the state of an outdated model.
    """

    kind: Literal["diloco"] = "diloco"
    lr: ServerLr = 0.7
    weighting: Literal["examples", "uniform"] = "uniform"
    nesterov: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2311.08105"


@dataclass(frozen=True)
class AdaptiveRule(AveragingRule, ABC):
    """m = beta1 m + (1 - beta1) D, v as the rule says, theta += lr m / (sqrt v + tau).

    m starts at 0 and v at tau^2. Traps: v is made of the square of the mean change, not of the mean of squares; there
    is no bias correction, unlike in most code named Adam; lr is about how far a coordinate moves in a round, so that
    FedAvg's 1 is far too much; with tau well above |D| the rule is momentum with lr / tau.
    """

    lr: ServerLr = 1e-3
    beta1: Decay = 0.9
    tau: Annotated[float, Range("keeps steps finite", ABOVE_0)] = 1e-3
    paper: ClassVar[str] = "arXiv 2003.00295"

    @abstractmethod
    def second(self, v: Vector, square: Vector) -> Vector:
        """The next v (P,), from the last one and D^2."""

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """m = 0, v = tau^2."""
        moments = {"m": torch.zeros_like(params), "v": torch.full_like(params, self.tau**2)}
        return replace(super().init(params, layout), moments=moments)

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr m / (sqrt v + tau)."""
        mean = aggregate.total / aggregate.weight
        m = self.beta1 * state.moments["m"] + (1 - self.beta1) * mean
        v = self.second(state.moments["v"], mean.square())
        params = state.params + self.lr * m / (v.sqrt() + self.tau)
        return replace(state, round=state.round + 1, params=params, moments={"m": m, "v": v})


@dataclass(frozen=True)
class FedAdagrad(AdaptiveRule):
    """v += D^2; m and theta as in `AdaptiveRule`.

    As in the paper, beta1 is 0 by default: m is then D. Trap: steps only ever get smaller.
    """

    kind: Literal["fedadagrad"] = "fedadagrad"
    beta1: Decay = 0.0

    def second(self, v: Vector, square: Vector) -> Vector:
        """v + D^2."""
        return v + square


@dataclass(frozen=True)
class FedAdam(AdaptiveRule):
    """v = beta2 v + (1 - beta2) D^2; m and theta as in `AdaptiveRule`."""

    kind: Literal["fedadam"] = "fedadam"
    beta2: Decay = 0.99

    def second(self, v: Vector, square: Vector) -> Vector:
        """beta2 v + (1 - beta2) D^2."""
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(AdaptiveRule):
    """v -= (1 - beta2) D^2 sign(v - D^2); m and theta as in `AdaptiveRule`.

    When changes become small, Adam forgets (1 - beta2) v a round, and Yogi only (1 - beta2) D^2.
    """

    kind: Literal["fedyogi"] = "fedyogi"
    beta2: Decay = 0.99

    def second(self, v: Vector, square: Vector) -> Vector:
        """v - (1 - beta2) D^2 sign(v - D^2)."""
        return v - (1 - self.beta2) * square * (v - square).sign()
