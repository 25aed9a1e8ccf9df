"""FedNova: clients that take more steps do not weigh more for it (Wang et al. 2020, arXiv 2007.07481)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Decay, Ends, Finished, NeedsSgd
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update


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


def accumulated(steps: float, momentum: float) -> float:
    """|a|_1 of so many steps: the j-th gradient from the end counts 1 + m + ... + m^(j-1)."""
    faded: float = momentum**steps
    return (steps - momentum * (1 - faded) / (1 - momentum)) / (1 - momentum)
