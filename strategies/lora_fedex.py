"""FedEx-LoRA: FedIT's average, its error put right in the base (Singhal et al. 2024, arXiv 2410.09432)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.adapters import count, products
from strategies.fedavg import FedAvg
from strategies.layout import LORA_A, LORA_B, Layout
from strategies.types import Aggregate, Broadcast, Memory, ServerState, Update, Vector


@dataclass(frozen=True)
class FedExLora(FedAvg):
    """A and B as in FedAvg, then W += s (sum_k p_k B_k A_k - mean(B) mean(A)). Reads the sum of products; no memory.

    Exact. With lr below 1 the products too move by lr from the round's start to their mean. The residual of a round has
    a rank of at most r times the clients, and goes down as its factors where these are smaller than the dense matrix.
    Under secure aggregation a client would send its product beside A and B. Trap: the base changes every round, which
    4-bit bases cannot, and the adapter alone is not the model.
    """

    kind: Literal["fedex"] = "fedex"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2410.09432"

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and in "count" of how many clients the last round's residual is made."""
        return replace(super().broadcast(state), extras=dict(state.moments))

    def finish(
        self, update: Update, got: Broadcast, memory: Memory, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, Memory]:
        """Adds w_k s B_k A_k."""
        update, memory = super().finish(update, got, memory, ends)
        product = products(got.params + update.delta, got.layout)
        return replace(update, extras={"product": update.weight * product}), memory

    def beside(self, layout: Layout) -> dict[str, int]:
        """The products."""
        return {"product": sum(outputs * inputs for outputs, inputs in layout.product_shapes)}

    def floats(self, got: Broadcast) -> tuple[int, int]:
        """The vector and the last round's residual down, the vector up, from which the server makes the product."""
        size, clients = got.layout.size, int(got.extras["count"]) if "count" in got.extras else 0
        dense = sum(outputs * inputs for outputs, inputs in got.layout.product_shapes)
        return size + min(dense, clients * count(got.layout, LORA_A, LORA_B)), size

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step, and into the residual what its product lacks."""
        moved = super().apply(state, aggregate)
        mean = aggregate.extras["product"] / aggregate.weight
        wanted = torch.lerp(products(state.params, state.layout), mean, self.lr)
        residual = wanted - products(moved.params, state.layout)
        if state.residual is not None:
            residual += state.residual
        return replace(moved, residual=residual, moments={"count": torch.tensor([float(aggregate.count)])})
