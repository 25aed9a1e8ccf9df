"""FedEx-LoRA: FedIT's average, its error put right in the base (Singhal et al. 2024, arXiv 2410.09432)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import count, product_change
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update, Vector


@dataclass(frozen=True)
class FedExLora(FedAvg):
    """A and B as in FedAvg, then W += s (sum_k p_k B_k A_k - mean(B) mean(A)). Reads the sum of products; no state.

    Exact. With lr below 1 the products too move by lr from the round's start to their mean. A merged delta has
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
        """The global vector, and in "count" of how many clients the last merged delta is made."""
        return replace(super().broadcast(state), extras=dict(state.moments))

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Adds w_k times the change of s B A."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        change = product_change(broadcast.params + update.delta, broadcast.params, broadcast.layout)
        return replace(update, extras={"product": update.weight * change}), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """The products' changes."""
        return {"product": sum(outputs * inputs for outputs, inputs in layout.product_shapes)}

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The vector and the last round's merged delta down, the vector up, from which the server makes the product."""
        size, clients = broadcast.layout.size, int(broadcast.extras["count"]) if "count" in broadcast.extras else 0
        dense = sum(outputs * inputs for outputs, inputs in broadcast.layout.product_shapes)
        return size + min(dense, clients * count(broadcast.layout, LORA_A, LORA_B)), size

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step, and into the merged delta what its product lacks."""
        moved = super().apply(state, aggregate)
        step = aggregate.extras["product"] * (self.lr / aggregate.weight)
        merged_delta = step - product_change(moved.params, state.params, state.layout)
        if state.merged_delta is not None:
            merged_delta += state.merged_delta
        return replace(moved, merged_delta=merged_delta, moments={"count": torch.tensor([float(aggregate.count)])})
