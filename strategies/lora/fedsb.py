"""Fed-SB: only an r x r matrix between two fixed bases moves (Singhal et al. 2025, arXiv 2502.15436).

Legend: P parameters, K clients, R rank, O outputs and I inputs of a layer.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.layout import LORA_A, LORA_B
from strategies.core.lora_algebra import count, put, svd
from strategies.core.protocol import (
    GLOBAL,
    Aggregate,
    Broadcast,
    ClientState,
    NeedsSgd,
    ServerState,
    Update,
    Vector,
    Vectors,
)
from strategies.lora.frozen_half import FrozenHalf


@dataclass(frozen=True)
class FedSb(FrozenHalf):
    """W = W0 + s B0 R A0 with orthonormal B0, A0; R += lr * sum_k p_k delta_k R. Exact. Reads the sum.

    The trained vector holds A0 and B = B0 R: the gradient of B is projected on the span of B0, and so is B's end.
    With plain SGD, with or without momentum, that is the same as training R (clipping included: projected gradients
    have R's norm). Trap: adaptive optimizers scale B's elements one by one, so their steps leave the span, and what is
    outside is cut off at the end. That is not Adam on R, hence plain SGD.

    The paper finds B0, R, A0 by an SVD of the first full fine-tuning step's gradient. Here only adapters have
    gradients: round 0 trains all of B as FFA-LoRA does, and the SVD U S V' of its mean B A gives B0 = U, R = S,
    A0 = V', which leaves the effective weights alone. So A0 stays in the row space of the A that was drawn. Under
    client-level privacy noise is added to all of B, also outside the span of B0, where it stays.
    """

    kind: Literal["fedsb"] = "fedsb"
    keeps_basis: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2502.15436"

    @property
    def needs_optimizer(self) -> NeedsSgd:
        """SGD with any momentum."""
        return NeedsSgd("trains within the span of its basis, which adaptive optimizers leave", 'use "ffa"')

    def frozen(self, round_: int) -> str:
        """A, which only the server changes."""
        return LORA_A

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and from round 1 on B0 in "basis", where B lies in the vector."""
        return replace(super().broadcast(state), extras=dict(state.moments))

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """The gradient of A becomes zero, that of B is projected on the span of B0."""
        super().correct(grad_KP, params_KP, broadcast, client_state, run)
        for grad_P in grad_KP:
            project(grad_P, broadcast)

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends the part of B's change that lies in the span of B0."""
        update, client_state = super().finish(update, broadcast, client_state, ends)  # the delta is a copy by now
        project(update.delta, broadcast)
        return update, client_state

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """Round 0: B; then r x r both ways, after the bases came down once, in round 1."""
        layout = broadcast.layout
        rest = layout.size - count(layout, LORA_A, LORA_B)
        if "basis" not in broadcast.extras:
            return rest + count(layout, LORA_B), rest + count(layout, LORA_B)
        square = rest + len(layout.product_shapes) * layout.rank**2
        return (layout.size if broadcast.round == 1 else square), square

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step; after the first round that moved, the product in its SVD, whose factors are the bases."""
        moved = super().apply(state, aggregate)
        if "basis" in state.moments or not aggregate.total.any():
            return moved
        params, basis = moved.params.clone(), torch.zeros_like(moved.params)
        for pair, kept in zip(state.layout.lora_pairs(params), state.layout.lora_pairs(basis), strict=True):
            u_OR, s_R, v_RI = svd(pair)
            put(pair, u_OR * s_R, v_RI)
            put(kept, u_OR, torch.zeros_like(v_RI))
        return replace(moved, params=params, moments={"basis": basis})


def project(vector: Vector, broadcast: Broadcast) -> None:
    """Projects the B matrices of the vector (P,) on the span of B0, in place; round 0 has no B0 yet."""
    if "basis" not in broadcast.extras:
        return
    bases = broadcast.layout.lora_pairs(broadcast.extras["basis"])
    for pair, basis in zip(broadcast.layout.lora_pairs(vector), bases, strict=True):
        pair.b_OR.copy_(basis.b_OR @ (basis.b_OR.T @ pair.b_OR))
