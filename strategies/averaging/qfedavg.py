"""q-FedAvg: clients with a higher loss weigh more (Li et al. 2020, arXiv 1905.10497, algorithm 2)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished, NeedsSgd
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update
from strategies.core.ranges import ABOVE_0, Range

LEAST = 1e-10  # of a loss: F^(q - 1) has no value at 0; about what the authors' code adds to every loss


@dataclass(frozen=True)
class QFedAvg(AveragingRule):
    """theta += lr sum_k F_k^q L delta_k / sum_k h_k, h_k = q F_k^(q-1) |L delta_k|^2 + L F_k^q: algorithm 2.

    It minimizes sum_k F_k^(q+1). F_k is the client's loss before its training. `lipschitz` is L, by default 1 / the
    mean local learning rate, as in the paper. Reads the sum: with everything divided by L, a client's weight is
    w_k F_k^q, and it sends w_k q F_k^(q-1) L |delta_k|^2 as one more number. The algorithm samples clients by their
    share of the rows and then weighs them the same; `weighting` "examples" is for a uniform cohort, w_k then the rows.

    Traps: q = 0 is FedAvg. 1 / lr is meant for SGD; with an adaptive local optimizer |delta_k|^2 / lr is so large that
    the model hardly moves: set `lipschitz`, or a q near 0. Losses must not be negative. Each round costs one more
    forward pass over the client's rows.
    """

    kind: Literal["qfedavg"] = "qfedavg"
    weighting: Literal["examples", "uniform"] = "uniform"
    q: Annotated[float, Range("is the weight of unfairness")] = 1.0
    lipschitz: Annotated[float | None, Range("is the gradients' Lipschitz constant", ABOVE_0)] = None
    elementwise: ClassVar[bool] = False
    loss_before: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1905.10497"

    @property
    def bounded_weights(self) -> bool:
        """A loss has no bound."""
        return False

    @property
    def weighs_alike(self) -> bool:
        """Clients weigh by their losses."""
        return False

    @property
    def needs_optimizer(self) -> NeedsSgd | None:
        """SGD, unless the curvature is given."""
        why = "takes 1 / lr for the loss's curvature, which holds for SGD alone"
        return NeedsSgd(why, "set strategy.lipschitz") if self.lipschitz is None else None

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """The weight w F^q, and the rest of w h / L beside delta."""
        weight = 1.0 if self.weighting == "uniform" else update.weight
        loss = max(update.metrics["loss_before"], LEAST)
        lipschitz = self.lipschitz or update.metrics["steps"] / update.metrics["rates"]
        square = torch.linalg.vector_norm(update.delta, dtype=torch.float64).item() ** 2
        bend = torch.tensor([weight * self.q * loss ** (self.q - 1) * lipschitz * square])
        return replace(update, weight=weight * loss**self.q, extras={"bend": bend}), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """w h / L."""
        return {"bend": 1}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr sum w F^q delta / sum w h / L."""
        change = aggregate.total * (self.lr / (aggregate.weight + aggregate.extras["bend"].item()))
        return replace(state, round=state.round + 1, params=state.params + change)
