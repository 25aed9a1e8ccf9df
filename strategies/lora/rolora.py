"""RoLoRA: rounds train and average B and A in turn (Chen et al. 2025, arXiv 2502.01755)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.core.layout import LORA_A, LORA_B
from strategies.lora.frozen_half import FrozenHalf


@dataclass(frozen=True)
class RoLora(FrozenHalf):
    """Rounds 0, 2, ...: B += lr * sum_k p_k delta_k B, A frozen; rounds 1, 3, ...: the same for A, B frozen. Exact.

    Reads the sum. B comes first: while B is zero, A has no gradient. Both halves go down each round, since a client may
    have missed the round before. Trap: an optimizer state kept from the last round would move the frozen half.
    """

    kind: Literal["rolora"] = "rolora"
    keeps_basis: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2502.01755"

    def frozen(self, round_: int) -> str:
        """A and B in turn."""
        return LORA_B if round_ % 2 else LORA_A
