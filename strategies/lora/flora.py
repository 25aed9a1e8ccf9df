"""FLoRA: all clients' products are merged into the base, adapters start afresh (Wang et al. 2024, arXiv 2409.05976)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import (
    floats_at,
    folded,
    product_change,
    product_size,
    products,
    start_at,
    unmarked,
    without,
)
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector
from strategies.core.seeds import torch_rng


@dataclass(frozen=True)
class Flora(AveragingRule):
    """W += lr * sum_k p_k s_k B_k A_k, then a fresh A and B = 0. Exact for any ranks. Reads the sum of products.

    The stack of all p_k B_k and A_k has the sum of the products as its product, and s_k = alpha / r_k is folded in. The
    paper's server sends the stack: the traffic down grows with the number of clients, each counted at the largest rank,
    and a client that missed a round needs that round's stack too, which is not counted here. A client sends the change
    of its product since it started, which is the product itself wherever B starts at zero. Each round's A is drawn by
    the seed as PEFT draws it (Kaiming uniform, a = sqrt 5), one for all clients; in the paper each client draws its own
    Gaussian one. Traps: the base changes every round, and so does the meaning of the adapter's coordinates: a kept
    optimizer state means nothing.
    """

    kind: Literal["flora"] = "flora"
    needs_lora: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = False
    merges_into_base: ClassVar[bool] = True
    sends_products: ClassVar[bool] = True
    extras_are_changes: ClassVar[bool] = True
    keeps_higher_ranks: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2409.05976"

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and in "count" the number of clients in the last round's stack."""
        return replace(super().broadcast(state), extras=dict(state.moments))

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector cut to the client's rank."""
        return {GLOBAL: start_at(broadcast, broadcast.rank)}

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends w_k times the change of s_k B_k A_k instead of the adapters' changes."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        layout = broadcast.layout
        end = folded(broadcast.params + update.delta, broadcast)
        change = product_change(end, folded(start_at(broadcast, broadcast.rank), broadcast), layout)
        delta = without(update.delta, layout, LORA_A, LORA_B)
        return replace(update, delta=delta, extras={"product": update.weight * change}), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """The products' changes."""
        return {"product": product_size(layout)}

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the adapters, whose products travel beside."""
        return {"delta": unmarked(layout, LORA_A, LORA_B)}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """Every coordinate."""
        return None

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The last round's stack down (at first the seed says all), the client's own adapters up."""
        layout = broadcast.layout
        stacked = int(broadcast.extras["count"]) * layout.rank if "count" in broadcast.extras else 0
        return floats_at(layout, stacked), floats_at(layout, broadcast.rank)

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """merged delta += the product and its mean change, then new adapters; all other tensors as in FedAvg."""
        moved = super().apply(state, aggregate)
        merged_delta = products(state.params, state.layout)
        merged_delta += aggregate.extras["product"] * (self.lr / aggregate.weight)
        if state.merged_delta is not None:
            merged_delta += state.merged_delta
        params = fresh(moved.params, state.layout, torch_rng(state.seed, moved.round, -1, "adapters"))
        moments = {"count": torch.tensor([float(aggregate.count)])}
        return replace(moved, params=params, merged_delta=merged_delta, moments=moments)


def fresh(params: Vector, layout: Layout, stream: torch.Generator) -> Vector:
    """A copy whose adapters are new: A uniform in +-1 / sqrt(I), which is PEFT's Kaiming bound, and B zero."""
    params = params.clone()
    for pair in layout.lora_pairs(params):
        bound = pair.a_RI.shape[1] ** -0.5
        pair.a_RI.uniform_(-bound, bound, generator=stream)
        pair.b_OR.zero_()
    return params
