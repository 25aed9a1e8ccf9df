"""FedSA-LoRA: A is shared, each client keeps its own B (Guo et al., ICLR 2025, arXiv 2410.01463)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished
from strategies.core.layout import LORA_B, Layout, unpacked
from strategies.core.lora_algebra import unmarked, zeroed
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
    sends_all_it_trains: ClassVar[bool] = False
    receives_live: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.01463"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global A with the client's own B."""
        personal = self.personal(broadcast, client_state)
        return {GLOBAL: broadcast.params if personal is None else personal}

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps B and sends no change of it."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        end, delta = broadcast.params + update.delta, zeroed(update.delta.clone(), broadcast.layout, LORA_B)
        b = torch.cat([pair.b_OR.flatten() for pair in broadcast.layout.lora_pairs(end)])
        return replace(update, delta=delta), client_state | {"b": b}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The global A with the client's own B, once it has one."""
        if "b" not in client_state:
            return None
        vector = broadcast.params.clone()
        parts = [pair.b_OR for pair in broadcast.layout.lora_pairs(vector)]
        for part, b_OR in zip(parts, unpacked(client_state["b"], [part.shape for part in parts]), strict=True):
            part.copy_(b_OR)
        return vector

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but B."""
        return {"delta": unmarked(layout, LORA_B)}
