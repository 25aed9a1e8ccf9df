"""Centered clipping: changes are clipped around the last one (Karimireddy et al. 2021, arXiv 2012.10333)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update
from strategies.core.ranges import ABOVE_0, Range


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
    tau: Annotated[float, Range("is the norm that is clipped to", ABOVE_0)] = 1.0
    elementwise: ClassVar[bool] = False
    zero_moments: ClassVar[tuple[str, ...]] = ("v",)
    sends_moments: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2012.10333"

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sends clip(delta - v, tau)."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        apart = update.delta - broadcast.extras["v"]
        norm = torch.linalg.vector_norm(apart, dtype=torch.float64).item()
        return replace(update, delta=apart * (self.tau / max(norm, self.tau))), client_state

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """v += mean clip(delta - v, tau), theta += lr v."""
        v = state.moments["v"] + aggregate.total / aggregate.weight
        return replace(state, round=state.round + 1, params=state.params + self.lr * v, moments={"v": v})
