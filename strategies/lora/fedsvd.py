"""FedSVD: clients train B, the server turns A to what was learned (Lee et al. 2025, arXiv 2505.12805)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.core.layout import LORA_A
from strategies.core.lora_algebra import put, svd
from strategies.core.protocol import Aggregate, ServerState
from strategies.lora.frozen_half import FrozenHalf


@dataclass(frozen=True)
class FedSvd(FrozenHalf):
    """B' = B + lr * sum_k p_k delta_k B; U S V' = SVD(B' A); A <- V', B <- U S. Exact. Reads the sum.

    The SVD of rank r loses nothing, and is that of an r x r matrix. A has orthonormal rows from the second round on,
    which bounds B's gradients (made for DP-SGD: the noise enters B alone). Traps: the order and the signs of V's rows
    are arbitrary, so a kept optimizer state means nothing in the next round. Weight decay as in `FrozenHalf`.
    """

    kind: Literal["fedsvd"] = "fedsvd"
    keeps_basis: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2505.12805"

    def frozen(self, round_: int) -> str:
        """A, which only the server changes."""
        return LORA_A

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
