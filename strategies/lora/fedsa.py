"""FedSA-LoRA: A is shared, each client keeps its own B (Guo et al., ICLR 2025, arXiv 2410.01463)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import LORA_B, Layout
from strategies.core.lora_algebra import count, slices, unmarked, without
from strategies.core.protocol import GLOBAL, Broadcast, Mask, Memory, Update, Vector


@dataclass(frozen=True)
class FedSaLora(FedAvg):
    """Both are trained; A += lr * sum_k p_k delta_k A, while B_k stays with its client. Reads the sum.

    Memory: "b", the client's B_k; a client's first one is the initial B, which is zero. Trap: there is no global model.
    The global vector keeps the initial B, so evaluated as "global" it is the base; what counts is "personal".
    """

    kind: Literal["fedsa"] = "fedsa"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    needs_lora: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    personalises: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.01463"

    def starts(self, got: Broadcast, memory: Memory) -> dict[str, Vector]:
        """The global A with the client's own B."""
        own = self.personal(got, memory)
        return {GLOBAL: got.params if own is None else own}

    def finish(
        self, update: Update, got: Broadcast, memory: Memory, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, Memory]:
        """Keeps B and sends no change of it."""
        update, memory = super().finish(update, got, memory, ends)
        end = got.params + update.delta
        b = torch.cat([end[part] for part in slices(got.layout, LORA_B)])
        return replace(update, delta=without(update.delta, got.layout, LORA_B)), memory | {"b": b}

    def personal(self, got: Broadcast, memory: Memory) -> Vector | None:
        """The global A with the client's own B, once it has one."""
        if "b" not in memory:
            return None
        own, parts = got.params.clone(), slices(got.layout, LORA_B)
        own_b = memory["b"].split([part.stop - part.start for part in parts])
        for part, b in zip(parts, own_b, strict=True):
            own[part] = b
        return own

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but B."""
        return {"delta": unmarked(layout, LORA_B)}

    def trained(self, got: Broadcast, memory: Memory, run: str = GLOBAL) -> Mask | None:
        """Both."""
        return None

    def floats(self, got: Broadcast) -> tuple[int, int]:
        """All but B, both ways."""
        sent = got.layout.size - count(got.layout, LORA_B)
        return sent, sent
