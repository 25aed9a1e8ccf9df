"""FedEx-LoRA: FedIT's average, its error put right in the base (Singhal et al. 2024, arXiv 2410.09432)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import count, product_change
from strategies.core.protocol import Aggregate, Broadcast, Memory, ServerState, Update, Vector


@dataclass(frozen=True)
class FedExLora(FedAvg):
    """A and B as in FedAvg, then W += s (sum_k p_k B_k A_k - mean(B) mean(A)). Reads the sum of products; no memory.

    Exact. With lr below 1 the products too move by lr from the round's start to their mean. The residual of a round has
    a rank of at most r times the clients, and goes down as its factors where these are smaller than the dense matrix.
    Under secure aggregation a client would send the change of its product beside A and B: zero means no move, so that
    differential privacy may clip it and divide by the expected cohort. Trap: the base changes every round, which
    4-bit bases cannot, and the adapter alone is not the model.
    """

    kind: Literal["fedex"] = "fedex"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    extras_are_changes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.09432"

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and in "count" of how many clients the last round's residual is made."""
        return replace(super().broadcast(state), extras=dict(state.moments))

    def finish(
        self, update: Update, got: Broadcast, memory: Memory, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, Memory]:
        """Adds w_k times the change of s B A."""
        update, memory = super().finish(update, got, memory, ends)
        change = product_change(got.params + update.delta, got.params, got.layout)
        return replace(update, extras={"product": update.weight * change}), memory

    def beside(self, layout: Layout) -> dict[str, int]:
        """The products' changes."""
        return {"product": sum(outputs * inputs for outputs, inputs in layout.product_shapes)}

    def floats(self, got: Broadcast) -> tuple[int, int]:
        """The vector and the last round's residual down, the vector up, from which the server makes the product."""
        size, clients = got.layout.size, int(got.extras["count"]) if "count" in got.extras else 0
        dense = sum(outputs * inputs for outputs, inputs in got.layout.product_shapes)
        return size + min(dense, clients * count(got.layout, LORA_A, LORA_B)), size

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step, and into the residual what its product lacks."""
        moved = super().apply(state, aggregate)
        step = aggregate.extras["product"] * (self.lr / aggregate.weight)
        residual = step - product_change(moved.params, state.params, state.layout)
        if state.residual is not None:
            residual += state.residual
        return replace(moved, residual=residual, moments={"count": torch.tensor([float(aggregate.count)])})
