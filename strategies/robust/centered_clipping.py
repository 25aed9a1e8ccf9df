"""Centered clipping: changes are clipped around the last one (Karimireddy et al. 2021, arXiv 2012.10333)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule
from strategies.core.errors import require
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update, Vector


@dataclass(frozen=True)
class CenteredClipping(AveragingRule):
    """v += mean_k clip(delta_k - v, tau), theta += lr v, where clip(x, tau) = x min(1, tau / |x|).

    One pass of the paper's rule, from the last round's v, which is broadcast. Reads the sum: a client's update is its
    clipped distance from v. All clients weigh the same, since an attacker would claim many rows.

    Traps: the clients themselves clip, so this holds against poisoned data and broken training, but against a client
    that breaks the protocol only if its update is proven or checked to be within tau. tau must be about the distance of
    honest changes from their mean: far above, nothing is clipped; far below, v follows slowly. The paper's guarantee
    also needs momentum on the clients (train.state = "keep").
    """

    kind: Literal["centred_clipping"] = "centred_clipping"
    weighting: Literal["uniform"] = "uniform"
    tau: float = 1.0
    elementwise: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2012.10333"

    def __post_init__(self) -> None:
        super().__post_init__()
        norm = "strategy.tau is the norm that is clipped to and must be a number above 0"
        require(0 < self.tau < math.inf, f"{norm}, not {self.tau}")

    @property
    def rests_at_zero(self) -> bool:
        """A client at rest sends -v."""
        return False

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """The initial vector, and v = 0."""
        return replace(super().init(params, layout), moments={"v": torch.zeros_like(params)})

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector and v."""
        return replace(super().broadcast(state), extras={"v": state.moments["v"]})

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends clip(delta - v, tau)."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        apart = update.delta - broadcast.extras["v"]
        norm = torch.linalg.vector_norm(apart, dtype=torch.float64).item()
        return replace(update, delta=apart * (self.tau / max(norm, self.tau))), client_state

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """v += mean clip(delta - v, tau), theta += lr v."""
        v = state.moments["v"] + aggregate.total / aggregate.weight
        return replace(state, round=state.round + 1, params=state.params + self.lr * v, moments={"v": v})
