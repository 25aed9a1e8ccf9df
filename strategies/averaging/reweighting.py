"""Clients weigh by their steps in FedNova (Wang et al. 2020), by their loss in q-FedAvg (Li et al. 2020)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Decay, Ends, Finished, NeedsSgd
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update
from strategies.core.ranges import ABOVE_0, Range

LEAST = 1e-10  # of a loss: F^(q - 1) has no value at 0; about what the authors' code adds to every loss


@dataclass(frozen=True)
class FedNova(AveragingRule):
    """theta += lr (sum_k p_k tau_k) (sum_k p_k delta_k / tau_k): the paper's rule with tau_eff = sum_k p_k tau_k.

    tau_k = |a_k|_1, the sum of the factors with which the client's gradients enter delta_k: its number of steps n for
    plain SGD, (n - m (1 - m^n) / (1 - m)) / (1 - m) with momentum m, which `momentum` must repeat from the local
    optimizer. Reads the sum: a client's weight is w_k / tau_k, and it sends w_k and w_k tau_k as two more numbers.

    Traps: with equal steps it is FedAvg. It is wrong for adaptive local optimizers, for momentum that is kept between
    rounds, and for learning rates that change within a round.
    """

    kind: Literal["fednova"] = "fednova"
    momentum: Decay = 0.0
    paper: ClassVar[str] = "arXiv 2007.07481"

    @property
    def needs_optimizer(self) -> NeedsSgd:
        """SGD with the same momentum and one learning rate a round."""
        return NeedsSgd("counts on what plain SGD does", momentum=self.momentum, constant=True)

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """The weight w / tau, and w and w tau beside delta."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        tau, weight = accumulated(update.metrics["steps"], self.momentum), update.weight
        sums = torch.tensor([weight, weight * tau])
        return replace(update, weight=weight / tau, extras={"weights": sums}), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """w and w tau."""
        return {"weights": 2}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr (sum w tau / sum w) (sum (w / tau) delta / sum w)."""
        weight, weighted_tau = aggregate.extras["weights"].tolist()
        change = aggregate.total * (self.lr * weighted_tau / weight**2)
        return replace(state, round=state.round + 1, params=state.params + change)


@dataclass(frozen=True)
class QFedAvg(AveragingRule):
    """theta += lr sum_k F_k^q L delta_k / sum_k h_k, h_k = q F_k^(q-1) |L delta_k|^2 + L F_k^q: algorithm 2.

    It minimizes sum_k F_k^(q+1). F_k is the client's loss before its training. `lipschitz` is L, by default 1 / the
    mean local learning rate, as in the paper. Reads the sum: with everything divided by L, a client's weight is
    w_k F_k^q, and it sends w_k q F_k^(q-1) L |delta_k|^2 as one more number. The algorithm samples clients by their
    share of the rows and then weighs them the same; `weighting` "examples" is for a uniform cohort, w_k then the rows.

    Traps: q = 0 is FedAvg. 1 / lr is meant for SGD; with an adaptive local optimizer |delta_k|^2 / lr is so large that
    the model hardly moves: set `lipschitz` or a small q. Losses must be at least 0. A round costs a forward pass more.
    """

    kind: Literal["qfedavg"] = "qfedavg"
    weighting: Literal["examples", "uniform"] = "uniform"
    q: Annotated[float, Range("is the weight of unfairness")] = 1.0
    lipschitz: Annotated[float | None, Range("is the gradients' Lipschitz constant", ABOVE_0)] = None
    elementwise: ClassVar[bool] = False
    loss_before: ClassVar[bool] = True
    bounded_weights: ClassVar[bool] = False  # a loss has no bound
    paper: ClassVar[str] = "arXiv 1905.10497"

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


def accumulated(steps: float, momentum: float) -> float:
    """|a|_1 after `steps` steps: the j-th gradient from the end counts 1 + m + ... + m^(j-1)."""
    faded: float = momentum**steps
    return (steps - momentum * (1 - faded) / (1 - momentum)) / (1 - momentum)
