"""FedSVD: clients train B, the server turns A to what was learnt (Lee et al. 2025, arXiv 2505.12805)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.core.layout import LORA_A
from strategies.core.lora_algebra import count, put, svd
from strategies.core.protocol import Aggregate, Broadcast, ServerState
from strategies.lora.ffa import FfaLora


@dataclass(frozen=True)
class FedSvd(FfaLora):
    """B' = B + lr * sum_k p_k delta_k B; U S V' = SVD(B' A); A <- V', B <- U S. Reads the sum; no state.

    Exact: one A for all in a round, and the SVD of rank r loses nothing. A has orthonormal rows from the second round
    on, which bounds B's gradients (made for DP-SGD: the noise enters B alone). The SVD is that of an r x r matrix. The
    order and the signs of V's rows are as they come, so a kept optimizer state means nothing in the next round. FFA's
    trap holds too.
    """

    kind: Literal["fedsvd"] = "fedsvd"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    elementwise: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2505.12805"

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """A and B down, all but A up."""
        return broadcast.layout.size, broadcast.layout.size - count(broadcast.layout, LORA_A)

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step, then the product in its other factors."""
        moved = super().apply(state, aggregate)
        if not aggregate.total.any():
            return moved  # other factors of the same product would only add their rounding
        params = moved.params.clone()
        for pair in state.layout.lora_pairs(params):
            u_OR, s_R, v_RI = svd(pair)
            put(pair, u_OR * s_R, v_RI)
        return replace(moved, params=params)
