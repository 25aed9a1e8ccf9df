"""Robust rules that a secure sum can serve: centered clipping and, with several sums a round, RFA.

Karimireddy et al. 2021, arXiv 2012.10333; Pillutla et al. 2022, arXiv 1912.13445, algorithms 1 and 2.
Legend: K clients, P parameters, B the coordinates of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished, Reads
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update, Vector
from strategies.core.ranges import ABOVE_0, AT_LEAST_1, Range
from strategies.robust.reading_each import blocks, by_coordinate


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

    @property
    def rests_at_zero(self) -> bool:
        """A client at rest sends -v."""
        return False

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


@dataclass(frozen=True)
class Rfa(AveragingRule):
    """theta += lr * z after `passes` times z <- sum b_k delta_k / sum b_k, b_k = p_k / max(nu, |delta_k - z|).

    The smoothed Weiszfeld algorithm for argmin_z sum p_k |delta_k - z|. A pass is a sum over the updates, which a
    secure sum can give: it reads "passes", and a real client receives z and sends b_k delta_k in each. z starts at
    zero, the server's model, so that one pass is the paper's one-step RFA and one huge update moves it little from the
    first pass on; the authors' code starts at the plain mean and counts that as its first pass. Trap: an attacker may
    still claim a large p_k (see `weighting`).
    """

    kind: Literal["rfa"] = "rfa"
    passes: Annotated[int, Range("is the number of sums over the updates", AT_LEAST_1)] = 3
    nu: Annotated[float, Range("keeps distances away from 0", ABOVE_0)] = 1e-6
    reads: ClassVar[Reads] = "passes"
    elementwise: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 1912.13445"

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """A vector down and a vector up for each pass; the first z is the global vector's own zero."""
        down, up = super().floats(broadcast)
        return down + (self.passes - 1) * broadcast.params.numel(), self.passes * up

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr * the geometric median of the deltas."""
        assert aggregate.each is not None
        deltas = [update.delta for update in aggregate.each]
        weights_K = torch.tensor([update.weight for update in aggregate.each], dtype=torch.float64)
        z_P = torch.zeros_like(state.params)
        for _ in range(self.passes):
            z_P = weighted_mean(deltas, weights_K / distances(deltas, z_P).clamp(min=self.nu))
        return replace(state, round=state.round + 1, params=state.params + self.lr * z_P)


def distances(deltas: Sequence[Vector], z_P: Vector) -> torch.Tensor:
    """|delta_k - z| for every client (K,), in float64."""
    squares_K = torch.zeros(len(deltas), dtype=torch.float64)
    for part, x_KB in blocks(deltas):
        squares_K += (x_KB.double() - z_P[part]).square().sum(dim=1)
    return squares_K.sqrt()


def weighted_mean(deltas: Sequence[Vector], weights_K: torch.Tensor) -> Vector:
    """sum b_k delta_k / sum b_k (P,)."""
    shares_K = weights_K / weights_K.sum()
    return by_coordinate(deltas, lambda x_KB: (shares_K @ x_KB.double()).float())
