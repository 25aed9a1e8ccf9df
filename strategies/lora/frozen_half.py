"""What rules share that train one half of the adapters, A or B, in a round."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from strategies.core.base import AveragingRule
from strategies.core.layout import Layout
from strategies.core.lora_algebra import count, freeze, unmarked, without
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Mask, Update, Vector, Vectors


@dataclass(frozen=True)
class FrozenHalf(AveragingRule, ABC):
    """theta += lr * sum_k p_k delta_k on all tensors but one half of the adapters, which stays as it is.

    Exact: with one frozen factor for all clients, the mean of the products is the product of the means. Trap: weight
    decay moves the frozen half during local training although its gradient is zero; the server's never changes.
    """

    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True

    @abstractmethod
    def frozen(self, round_: int) -> str:
        """The marker of the half that this round leaves alone."""

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """The gradient of the frozen half becomes zero."""
        freeze(grad_KP, broadcast.layout, self.frozen(broadcast.round))

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends no change of the frozen half."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        delta = without(update.delta, broadcast.layout, self.frozen(broadcast.round))
        return replace(update, delta=delta), client_state

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the frozen half."""
        return {"delta": unmarked(layout, self.frozen(round_))}

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """Everything down, all but the frozen half up."""
        size = broadcast.layout.size
        return size, size - count(broadcast.layout, self.frozen(broadcast.round))
