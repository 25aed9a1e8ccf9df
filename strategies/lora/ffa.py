"""FFA-LoRA: A stays as it was drawn, only B is trained and averaged (Sun et al. 2024, arXiv 2403.12313)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.core.layout import LORA_A
from strategies.core.protocol import Broadcast
from strategies.lora.frozen_half import FrozenHalf


@dataclass(frozen=True)
class FfaLora(FrozenHalf):
    """B += lr * sum_k p_k delta_k B, A = A_0. Exact. Reads the sum.

    It takes half the traffic, since A follows from the seed. Trap: everything learned lies in the row space of A_0, so
    that it wants a higher rank or learning rate than LoRA.
    """

    kind: Literal["ffa"] = "ffa"
    paper: ClassVar[str] = "arXiv 2403.12313"

    def frozen(self, round_: int) -> str:
        """Always A."""
        return LORA_A

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """All but A, both ways."""
        _, up = super().floats(broadcast)
        return up, up
