"""Rules that train one half of the adapters, A or B, in a round: FFA-LoRA, RoLoRA, FedSVD and Fed-SB.

Legend: P parameters, K clients, R rank, O outputs and I inputs of a layer.
"""

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished, NeedsSgd, Vectors
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import put, svd, unmarked, zeroed
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector
from strategies.core.seeds import torch_rng


@dataclass(frozen=True)
class FrozenHalf(AveragingRule, ABC):
    """theta += lr * sum_k p_k delta_k on all tensors but one half of the adapters, which stays as it is.

    Exact: with one frozen factor for all clients, the mean of the products is the product of the means. Trap: weight
    decay moves the frozen half during local training although its gradient is zero; the server's never changes.
    """

    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True

    def frozen(self, round_: int) -> str:
        """The marker of the half that no client changes in this round: A."""
        return LORA_A

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """The gradient of the frozen half becomes zero."""
        zeroed(grad_KP, broadcast.layout, self.frozen(broadcast.round))

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sends no change of the frozen half."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        delta = zeroed(update.delta.clone(), broadcast.layout, self.frozen(broadcast.round))
        return replace(update, delta=delta), client_state

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the frozen half."""
        return {"delta": unmarked(layout, self.frozen(round_))}


@dataclass(frozen=True)
class FfaLora(FrozenHalf):
    """B += lr * sum_k p_k delta_k B, A = A_0 as it was drawn. Exact. Reads the sum (Sun et al. 2024).

    It takes half the traffic, since A follows from the seed. Trap: everything learned lies in the row space of A_0, so
    that it wants a higher rank or learning rate than LoRA.
    """

    kind: Literal["ffa"] = "ffa"
    receives_what_it_sends: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2403.12313"


@dataclass(frozen=True)
class RoLora(FrozenHalf):
    """Rounds 0, 2, ...: B += lr * sum_k p_k delta_k B, A frozen; rounds 1, 3, ...: the same for A, B frozen. Exact.

    Reads the sum (Chen et al. 2025). B comes first: while B is zero, A has no gradient. Both halves go down each round,
    since a client may have missed the round before. Trap: a kept optimizer state would move the frozen half.
    """

    kind: Literal["rolora"] = "rolora"
    keeps_basis: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2502.01755"

    def frozen(self, round_: int) -> str:
        """A and B in turn."""
        return LORA_B if round_ % 2 else LORA_A


@dataclass(frozen=True)
class FedSvd(FrozenHalf):
    """B' = B + lr * sum_k p_k delta_k B; U S V' = SVD(B' A); A <- V', B <- U S. Exact. Reads the sum (Lee et al. 2025).

    The SVD of rank r loses nothing, and is that of an r x r matrix. A has orthonormal rows from the second round on,
    which bounds B's gradients (made for DP-SGD: the noise enters B alone). Traps: the order and the signs of V's rows
    are arbitrary, so a kept optimizer state means nothing in the next round. Weight decay as in `FrozenHalf`.
    """

    kind: Literal["fedsvd"] = "fedsvd"
    keeps_basis: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2505.12805"

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


@dataclass(frozen=True)
class FedSb(FrozenHalf):
    """W = W0 + s B0 R A0 with orthonormal B0, A0; R += lr * sum_k p_k delta_k R. Exact. Reads the sum.

    The trained vector holds A0 and B = B0 R: the gradient of B is projected on the span of B0. With plain SGD, with or
    without momentum, that is the same as training R (clipping included: projected gradients have R's norm). A client
    sends the change of R, in the first rows of B's place; nothing else of B is sent, so that noise enters R alone.
    Trap: adaptive optimizers scale B's elements one by one, so their steps leave the span, and what is outside is cut
    off at the end. That is not Adam on R, hence plain SGD.

    The paper finds B0, R, A0 by an SVD of the first full fine-tuning step's gradient. Here only adapters have
    gradients: round 0 trains all of B as FFA-LoRA does, and the SVD U S V' of its mean B A gives B0 = U, R = S,
    A0 = V', which leaves the effective weights alone. So A0 stays in the row space of the A that was drawn. If round 0
    has no result, B0 is drawn by the seed, and A0 is A.
    """

    kind: Literal["fedsb"] = "fedsb"
    begins_fresh: ClassVar[bool] = True  # else the bases would be those of the start, and not of what round 0 adds
    keeps_basis: ClassVar[bool] = False
    needs_optimizer: ClassVar[NeedsSgd] = NeedsSgd(
        "trains within the span of its basis, which adaptive optimizers leave", 'use "ffa"'
    )
    paper: ClassVar[str] = "arXiv 2502.15436"

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and from round 1 on B0 in "basis", where B lies in the vector."""
        return replace(super().broadcast(state), extras=bases(state))

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """The gradient of A becomes zero, that of B is projected on the span of B0."""
        super().correct(grad_KP, params_KP, broadcast, client_state, model)
        for grad_P in grad_KP:
            for b_OR, b0_OR in with_bases(grad_P, broadcast.layout, broadcast.extras):
                b_OR.copy_(b0_OR @ (b0_OR.T @ b_OR))

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sends B0' times the change of B, the change of R, in the first rows of B's place."""
        update, client_state = super().finish(update, broadcast, client_state, ends)  # the delta is a copy by now
        for b_OR, b0_OR in with_bases(update.delta, broadcast.layout, broadcast.extras):
            r_RR = b0_OR.T @ b_OR
            b_OR.zero_()[: len(r_RR)] = r_RR[: len(b_OR)]  # a layer of fewer outputs has fewer columns in B0
        return update, client_state

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but A, and from round 1 on no more of B's place than R takes."""
        if round_ == 0:
            return super().sent_masks(round_, layout)
        mask = unmarked(layout, LORA_A, LORA_B)
        for pair in layout.lora_pairs(mask):
            pair.b_OR[: layout.lora_rank] = True
        return {"delta": mask}

    def trained_mask(self, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL) -> Mask | None:
        """All but A."""
        return unmarked(broadcast.layout, LORA_A)

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """What is sent, both ways, after the bases came down once, in round 1."""
        _, sent = super().floats(broadcast)
        return (broadcast.layout.size if broadcast.round == 1 else sent), sent

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step on B0 R; in round 0 on B, whose product with A then gives the bases by its SVD."""
        total, extras = aggregate.total.clone(), bases(state)
        for b_OR, b0_OR in with_bases(total, state.layout, extras):
            rank = min(b0_OR.shape)
            b_OR.copy_(b0_OR[:, :rank] @ b_OR[:rank])
        moved = replace(super().apply(state, replace(aggregate, total=total)), moments=extras)
        if extras or not total.any():
            return moved
        params, basis = moved.params.clone(), torch.zeros_like(moved.params)
        for pair, kept in zip(state.layout.lora_pairs(params), state.layout.lora_pairs(basis), strict=True):
            u_OR, s_R, v_RI = svd(pair)
            put(pair, u_OR * s_R, v_RI)
            put(kept, u_OR, torch.zeros_like(v_RI))
        return replace(moved, params=params, moments={"basis": basis})


def bases(state: ServerState) -> dict[str, Vector]:
    """B0 where B lies in the vector (P,), as "basis": empty in round 0, drawn if that round has left none."""
    if state.round == 0 or state.moments:
        return state.moments
    basis, stream = torch.zeros_like(state.params), torch_rng(state.seed, 0, -1, "sketch")
    for pair in state.layout.lora_pairs(basis):
        q_OR = torch.linalg.qr(torch.randn(pair.b_OR.shape, generator=stream))[0]
        pair.b_OR[:, : q_OR.shape[1]] = q_OR
    return {"basis": basis}


def with_bases(
    vector: Vector, layout: Layout, extras: dict[str, Vector]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's B in the vector (P,), a view (O, R), beside its B0; none while there are no bases."""
    if "basis" in extras:
        for pair, basis in zip(layout.lora_pairs(vector), layout.lora_pairs(extras["basis"]), strict=True):
            yield pair.b_OR, basis.b_OR
