"""FedEx-LoRA: FedIT's average, with its error corrected in the base (Singhal et al. 2024, arXiv 2410.09432)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import count, product_change, product_size
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update, Vector


@dataclass(frozen=True)
class FedExLora(AveragingRule):
    """A and B as in FedAvg, then W += s (sum_k p_k B_k A_k - mean(B) mean(A)). Exact. Reads the sum of products.

    With lr below 1 the products too move by lr from the round's start to their mean. A round's correction has a rank of
    at most r times the clients, and goes down as its factors where these are smaller than the dense matrix. A client
    sends the change of its product beside A and B: zero means no move, so that differential privacy may clip it and
    divide by the expected cohort. Traps: the base changes every round, which 4-bit bases cannot, and the adapter alone
    is not the model.
    """

    kind: Literal["fedex"] = "fedex"
    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    merges_into_base: ClassVar[bool] = True
    sends_products: ClassVar[bool] = True
    extras_are_changes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.09432"

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and in "count" the number of clients in the last round's correction."""
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
        return {"product": product_size(layout)}

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The vector and the last correction down, the vector up, from which the server makes the product."""
        layout, clients = broadcast.layout, int(broadcast.extras["count"]) if "count" in broadcast.extras else 0
        return layout.size + min(product_size(layout), clients * count(layout, LORA_A, LORA_B)), layout.size

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step, and into the merged delta what its product lacks."""
        moved = super().apply(state, aggregate)
        change = aggregate.extras["product"] * (self.lr / aggregate.weight)
        merged_delta = change - product_change(moved.params, state.params, state.layout)
        if state.merged_delta is not None:
            merged_delta += state.merged_delta
        return replace(moved, merged_delta=merged_delta, moments={"count": torch.tensor([float(aggregate.count)])})
