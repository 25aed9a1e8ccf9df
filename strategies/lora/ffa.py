"""FFA-LoRA: A stays as it was drawn, only B is trained and averaged (Sun et al. 2024, arXiv 2403.12313)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import LORA_A, Layout
from strategies.core.lora_algebra import count, freeze, unmarked, without
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Mask, Update, Vector, Vectors


@dataclass(frozen=True)
class FfaLora(FedAvg):
    """B += lr * sum_k p_k delta_k B, A = A_0. Reads the sum; no state.

    Exact: with one A for all, mean(B) A = mean(B A). Half the traffic, since A follows from the seed. All that is
    learnt lies in the row space of A_0, so that it wants a higher rank or learning rate than LoRA. Trap: weight decay
    shrinks A during local training although its gradient is zero; the server's A never changes.
    """

    kind: Literal["ffa"] = "ffa"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2403.12313"

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """The gradient of A becomes zero."""
        freeze(grad_KP, broadcast.layout, LORA_A)

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends no change of A."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        return replace(update, delta=without(update.delta, broadcast.layout, LORA_A)), client_state

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but A."""
        return {"delta": unmarked(layout, LORA_A)}

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """All but A, both ways."""
        sent = broadcast.layout.size - count(broadcast.layout, LORA_A)
        return sent, sent
