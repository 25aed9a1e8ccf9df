"""DiLoCo: many local AdamW steps, then Nesterov momentum on the server (Douillard et al. 2023, arXiv 2311.08105)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, check_decay
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Vector


@dataclass(frozen=True)
class DiLoCo(AveragingRule):
    """m = momentum m + D, theta += lr (D + momentum m), D = the clients' mean change: algorithm 1. Reads the sum.

    The outer step is that of torch.optim.SGD with nesterov on the gradient -D. Algorithm 1 averages plainly, hence
    `weighting` "uniform". The paper's clients keep their AdamW state from round to round: set train.state = "keep", or
    this is FedAvg with Nesterov momentum. Traps: it is made for a few clients that take part in every round, with
    hundreds of local steps; a client that is rarely sampled keeps the state of an outdated model.
    """

    kind: Literal["diloco"] = "diloco"
    lr: float = 0.7
    weighting: Literal["examples", "uniform"] = "uniform"
    momentum: float = 0.9
    paper: ClassVar[str] = "arXiv 2311.08105"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("momentum", self.momentum)

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """The initial vector, and m = 0."""
        return replace(super().init(params, layout), moments={"m": torch.zeros_like(params)})

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """m = momentum m + D, theta += lr (D + momentum m)."""
        mean = aggregate.total / aggregate.weight
        m = self.momentum * state.moments["m"] + mean
        params = state.params + self.lr * (mean + self.momentum * m)
        return replace(state, round=state.round + 1, params=params, moments={"m": m})
