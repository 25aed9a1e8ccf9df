"""Rules that train one half of the adapters, A or B, in a round: FFA-LoRA, RoLoRA and FedSVD."""

from abc import ABC
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.core.base import AveragingRule, Ends, Finished, Vectors
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import put, svd, unmarked, zeroed
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update


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
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """The gradient of the frozen half becomes zero."""
        zeroed(grad_KP, broadcast.layout, self.frozen(broadcast.round))

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sends no change of the frozen half."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        delta = zeroed(update.delta.clone(), broadcast.layout, self.frozen(broadcast.round))
        return replace(update, delta=delta), client_state

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the frozen half."""
        return {"delta": unmarked(layout, self.frozen(round_))}


@dataclass(frozen=True)
class FfaLora(FrozenHalf):
    """B += lr * sum_k p_k delta_k B, A = A_0 as it was drawn. Exact. Reads the sum (Sun et al. 2024).

    It takes half the traffic, since A follows from the seed. Trap: everything learned lies in the row space of A_0, so
    that it wants a higher rank or learning rate than LoRA.
    """

    kind: Literal["ffa"] = "ffa"
    receives_live: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2403.12313"


@dataclass(frozen=True)
class RoLora(FrozenHalf):
    """Rounds 0, 2, ...: B += lr * sum_k p_k delta_k B, A frozen; rounds 1, 3, ...: the same for A, B frozen. Exact.

    Reads the sum (Chen et al. 2025). B comes first: while B is zero, A has no gradient. Both halves go down each round,
    since a client may have missed the round before. Trap: an optimizer state kept from the last round would move the
    frozen half.
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
