"""FedSA-LoRA: A is shared, each client keeps its own B (Guo et al., ICLR 2025, arXiv 2410.01463)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule
from strategies.core.layout import LORA_B, Layout
from strategies.core.lora_algebra import count, slices, unmarked, without
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Mask, Update, Vector


@dataclass(frozen=True)
class FedSaLora(AveragingRule):
    """Both are trained; A += lr * sum_k p_k delta_k A, while B_k stays with its client. Reads the sum.

    Client state: "b", the client's B_k; a client's first one is the initial B, which is zero. Trap: there is no global
    model. The global vector keeps the initial B, so evaluated as "global" it is the base; look at "personal".
    """

    kind: Literal["fedsa"] = "fedsa"
    needs_lora: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.01463"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global A with the client's own B."""
        personal = self.personal(broadcast, client_state)
        return {GLOBAL: broadcast.params if personal is None else personal}

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Keeps B and sends no change of it."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        end = broadcast.params + update.delta
        b = torch.cat([end[part] for part in slices(broadcast.layout, LORA_B)])
        return replace(update, delta=without(update.delta, broadcast.layout, LORA_B)), client_state | {"b": b}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The global A with the client's own B, once it has one."""
        if "b" not in client_state:
            return None
        vector, parts = broadcast.params.clone(), slices(broadcast.layout, LORA_B)
        pieces = client_state["b"].split([part.stop - part.start for part in parts])
        for part, b in zip(parts, pieces, strict=True):
            vector[part] = b
        return vector

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but B."""
        return {"delta": unmarked(layout, LORA_B)}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """Both."""
        return None

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """All but B, both ways."""
        sent = broadcast.layout.size - count(broadcast.layout, LORA_B)
        return sent, sent
