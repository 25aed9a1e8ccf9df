"""RoLoRA: rounds train and average B and A in turn (Chen et al. 2025, arXiv 2502.01755)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import count, freeze, unmarked, without
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Mask, Update, Vector, Vectors


@dataclass(frozen=True)
class RoLora(FedAvg):
    """Rounds 0, 2, ...: B += lr * sum_k p_k delta_k B, A frozen; rounds 1, 3, ...: the same for A, B frozen.

    Exact: one factor is the same for all, so the mean of products is the product of means. Reads the sum; no state.
    B comes first: while B is zero, A has no gradient. Traps: an optimizer state kept from the last round would move the
    frozen half during local training, and so would weight decay; the server's frozen half never changes.
    """

    kind: Literal["rolora"] = "rolora"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2502.01755"

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """The gradient of the round's frozen half becomes zero."""
        freeze(grad_KP, broadcast.layout, frozen(broadcast.round))

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends no change of the frozen half."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        return replace(update, delta=without(update.delta, broadcast.layout, frozen(broadcast.round))), client_state

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """The half that the round trains."""
        return {"delta": unmarked(layout, frozen(round_))}

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """Both halves down, since a client may have missed the round before; the trained half up."""
        return broadcast.layout.size, broadcast.layout.size - count(broadcast.layout, frozen(broadcast.round))


def frozen(round_: int) -> str:
    """The marker of the half that this round leaves alone."""
    return LORA_B if round_ % 2 else LORA_A
