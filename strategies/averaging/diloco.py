"""DiLoCo: many local AdamW steps, then Nesterov momentum on the server (Douillard et al. 2023, arXiv 2311.08105)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.averaging.fedopt import FedAvgM
from strategies.core.protocol import Aggregate, ServerState


@dataclass(frozen=True)
class DiLoCo(FedAvgM):
    """m = momentum m + D, theta += lr (D + momentum m), D = the clients' mean change: algorithm 1. Reads the sum.

    The outer step is that of torch.optim.SGD with nesterov on the gradient -D. No memory of the rule's own, but the
    paper's clients keep their AdamW state from round to round: that is the recipe's train.state = "keep", without which
    this is FedAvg with Nesterov momentum. Algorithm 1 averages plainly, hence `weighting` "uniform". Traps: made for
    few clients that take part in every round, with hundreds of local steps; for one that is seldom drawn, the kept
    state is of a model long gone.
    """

    kind: Literal["diloco"] = "diloco"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    lr: float = 0.7
    weighting: Literal["examples", "uniform"] = "uniform"
    paper: ClassVar[str] = "arXiv 2311.08105"

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """m = momentum m + D, theta += lr (D + momentum m)."""
        mean = aggregate.total / aggregate.weight
        m = self.momentum * state.moments["m"] + mean
        params = state.params + self.lr * (mean + self.momentum * m)
        return replace(state, round=state.round + 1, params=params, moments={"m": m})
