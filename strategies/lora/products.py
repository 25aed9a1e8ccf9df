"""Rules whose clients send the changes of their products s B A, and what they share: FLoRA, FedEx-LoRA and FlexLoRA.

Legend: P parameters, R rank, I inputs and O outputs of a layer, S and L columns and rows of FlexLoRA's sketches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished
from strategies.core.layout import LORA_A, LORA_B, Layout, unpacked
from strategies.core.lora_algebra import floats_at, folded, product_change, products, put, start_at, unmarked, zeroed
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector
from strategies.core.ranges import Range
from strategies.core.seeds import torch_rng


@dataclass(frozen=True)
class ProductRule(AveragingRule, ABC):
    """A rule for mixed ranks: clients send w_k times the change of s_k B_k A_k instead of the adapters' changes.

    The server makes new adapters each round, so a kept optimizer state would mean nothing.
    """

    needs_lora: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = False
    sends_products: ClassVar[bool] = True
    extras_are_changes: ClassVar[bool] = True
    trains_what_it_sends: ClassVar[bool] = False

    @abstractmethod
    def changes(self, end: Vector, broadcast: Broadcast) -> dict[str, Vector]:
        """What goes beside the update, without the weight, of a client's last vector (P,) with its scale folded in."""

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector cut to the client's rank."""
        return {GLOBAL: start_at(broadcast, broadcast.lora_rank)}

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sends the products' changes beside the update, and none of the adapters."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        changes = self.changes(folded(broadcast.params + update.delta, broadcast), broadcast)
        extras = {name: update.weight * change for name, change in changes.items()}
        delta = zeroed(update.delta.clone(), broadcast.layout, LORA_A, LORA_B)
        return replace(update, delta=delta, extras=extras), client_state

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the adapters, whose products travel beside."""
        return {"delta": unmarked(layout, LORA_A, LORA_B)}


@dataclass(frozen=True)
class Flora(ProductRule):
    """W += lr * sum_k p_k s_k B_k A_k, then a fresh A and B = 0. Exact for any ranks. Reads the sum of products.

    (Wang et al. 2024.) The stack of all p_k B_k and A_k has the sum of the products as its product, and s_k = alpha /
    r_k is folded in. The paper's server sends the stack: the traffic down grows with the number of clients, each
    counted at the largest rank, and a client that missed a round needs that round's stack too, which is not counted
    here. A client sends the change of its product since it started, which is the product itself wherever B starts at
    zero. Each round's A is drawn by the seed as PEFT draws it (Kaiming uniform, a = sqrt 5), one for all clients; in
    the paper each client draws its own Gaussian one. Trap: the base changes every round.
    """

    kind: Literal["flora"] = "flora"
    merges_into_base: ClassVar[bool] = True
    keeps_higher_ranks: ClassVar[bool] = True
    sends_moments: ClassVar[bool] = True  # "count", the number of clients in the last round's stack
    paper: ClassVar[str] = "arXiv 2409.05976"

    def changes(self, end: Vector, broadcast: Broadcast) -> dict[str, Vector]:
        """The product's change since the client's own start."""
        start = folded(start_at(broadcast, broadcast.lora_rank), broadcast)
        return {"product": product_change(end, start, broadcast.layout)}

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The last round's stack down (at first the seed says all), the client's own adapters up."""
        layout = broadcast.layout
        return floats_at(layout, merged_clients(broadcast) * layout.lora_rank), floats_at(layout, broadcast.lora_rank)

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """merged delta += the product and its mean change, then new adapters; all other tensors as in FedAvg."""
        moved = super().apply(state, aggregate)
        merged_delta = products(state.params, state.layout)
        merged_delta += aggregate.extras["product"] * (self.lr / aggregate.weight)
        params = fresh(moved.params, state.layout, torch_rng(state.seed, moved.round, -1, "adapters"))
        return merged(replace(moved, params=params), merged_delta, aggregate)


@dataclass(frozen=True)
class FedExLora(AveragingRule):
    """A and B as in FedAvg, then W += s (sum_k p_k B_k A_k - mean(B) mean(A)). Exact. Reads the sum of products.

    (Singhal et al. 2024.) With lr below 1 the products too move by lr from the round's start to their mean. A round's
    correction has a rank of at most r times the clients, and goes down as its factors where these are smaller than the
    dense matrix. A client sends the change of its product beside A and B: zero means no move, so that differential
    privacy may clip it and divide by the expected cohort. Traps: the base changes every round, which 4-bit bases
    cannot, and the adapter alone is not the model.
    """

    kind: Literal["fedex"] = "fedex"
    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    merges_into_base: ClassVar[bool] = True
    sends_products: ClassVar[bool] = True
    sends_moments: ClassVar[bool] = True  # "count", the number of clients in the last round's correction
    extras_are_changes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.09432"

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Adds w_k times the change of s B A."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        change = product_change(broadcast.params + update.delta, broadcast.params, broadcast.layout)
        return replace(update, extras={"product": update.weight * change}), client_state

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The vector and the last correction down, the vector up, from which the server makes the product."""
        layout = broadcast.layout
        factors = merged_clients(broadcast) * (layout.size - floats_at(layout, 0))
        return layout.size + min(layout.product_size, factors), layout.size

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step, and into the merged delta what its product lacks."""
        moved = super().apply(state, aggregate)
        change = aggregate.extras["product"] * (self.lr / aggregate.weight)
        return merged(moved, change - product_change(moved.params, state.params, state.layout), aggregate)


def merged_clients(broadcast: Broadcast) -> int:
    """The number of clients whose products went into the base in the last round."""
    return int(broadcast.extras["count"]) if "count" in broadcast.extras else 0


def merged(state: ServerState, change: Vector, aggregate: Aggregate) -> ServerState:
    """The state with `change` in its merged delta, and the number of clients behind it."""
    merged_delta = change if state.merged_delta is None else change + state.merged_delta
    return replace(state, merged_delta=merged_delta, moments={"count": torch.tensor([float(aggregate.count)])})


def fresh(params: Vector, layout: Layout, stream: torch.Generator) -> Vector:
    """A copy whose adapters are new: A uniform in +-1 / sqrt(I), which is PEFT's Kaiming bound, and B zero."""
    params = params.clone()
    for pair in layout.lora_pairs(params):
        bound = pair.a_RI.shape[1] ** -0.5
        pair.a_RI.uniform_(-bound, bound, generator=stream)
        pair.b_OR.zero_()
    return params


Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FlexLora(ProductRule):
    """D = sum_k p_k s_k B_k A_k; U S V' = SVD(D), cut to the largest rank; B <- U S / s, A <- V'.

    A client of rank r_k gets the first r_k rows and columns, under its own scale. It sends the difference between its
    product and the round's D, and D moves by lr times the mean of that: zeros move nothing, so that differential
    privacy may clip them and divide by the expected cohort. Reads sums. The result is exact where the largest rank is
    the layers' full rank, else the best approximation of D. With mixed ranks D loses a client's share beyond its rank.

    `sketch` = 0: clients send the dense products' changes. Above 0: with shared random Q (I, S) and T (L, O),
    S = rank + sketch, L = 2 S + 1, they send X Q and T X for their change X, which are sums as well and far smaller
    than X; the server finds D's range from the first and D in it from the second (Tropp et al. 2017, arXiv 1609.00048),
    then its SVD. That is an approximation where D's rank exceeds S. Traps: A and B are other factors each round, so a
    kept optimizer state means nothing; the paper takes one scale for all clients, which mixed ranks do not have.
    """

    kind: Literal["flexlora"] = "flexlora"
    sketch: Annotated[int, Range("is the number of columns beyond the rank")] = 0
    paper: ClassVar[str] = "arXiv 2402.11505"

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and the round's random matrices for sketches, although the seed determines them."""
        return replace(super().broadcast(state), extras=self._drawn(state) if self.sketch else {})

    def changes(self, end: Vector, broadcast: Broadcast) -> dict[str, Vector]:
        """The change from the round's D to the client's product, or its sketches."""
        before, after = (self._seen(x, broadcast.layout, broadcast.extras) for x in (broadcast.params, end))
        return {name: after[name] - before[name] for name in before}

    def beside(self, layout: Layout) -> dict[str, int]:
        """The products' changes, or sketches of them."""
        if not self.sketch:
            return super().beside(layout)
        sizes = self._sizes(layout)
        return {"range": sum(o * s for o, _, s, _ in sizes), "core": sum(high * i for _, i, _, high in sizes)}

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The client's own adapters down; up as well, or the sketches."""
        down = floats_at(broadcast.layout, broadcast.lora_rank)
        return down, super().floats(broadcast)[1] if self.sketch else down

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The SVD of the product and its mean change gives the new adapters; all other tensors as in FedAvg."""
        moved = super().apply(state, aggregate)
        if not any(extra.any() for extra in aggregate.extras.values()):
            return moved  # other factors of the same product would only add their rounding
        drawn = self._drawn(state) if self.sketch else {}
        before, lr = self._seen(state.params, state.layout, drawn), self.lr / aggregate.weight
        wanted = {name: seen + aggregate.extras[name] * lr for name, seen in before.items()}
        params = moved.params.clone()
        factors = self._factors(wanted, state.layout, drawn)
        for pair, (u_OR, s_R, v_RI) in zip(state.layout.lora_pairs(params), factors, strict=True):
            put(pair, u_OR * s_R / pair.scale, v_RI)
        return replace(moved, params=params)

    def _sizes(self, layout: Layout) -> list[tuple[int, int, int, int]]:
        """(O, I, S, L) of each pair; a sketch is never larger than the product."""
        shapes = [(o, i, min(layout.lora_rank + self.sketch, o, i)) for o, i in layout.product_shapes]
        return [(o, i, s, min(2 * s + 1, o)) for o, i, s in shapes]

    def _drawn(self, state: ServerState) -> dict[str, Vector]:
        """The round's Q (I, S) and T (L, O) of all pairs, flat: orthonormal columns and rows."""
        stream = torch_rng(state.seed, state.round, -1, "sketch")
        columns, rows = [], []
        for o, i, s, high in self._sizes(state.layout):
            columns.append(torch.linalg.qr(torch.randn(i, s, generator=stream))[0].flatten())
            rows.append(torch.linalg.qr(torch.randn(o, high, generator=stream))[0].T.flatten())
        return {"columns": torch.cat(columns), "rows": torch.cat(rows)}

    def _tests(self, layout: Layout, drawn: dict[str, Vector]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Q (I, S) and T (L, O) of one pair after another."""
        sizes = self._sizes(layout)
        columns = unpacked(drawn["columns"], [(i, s) for _, i, s, _ in sizes])
        return zip(columns, unpacked(drawn["rows"], [(high, o) for o, _, _, high in sizes]), strict=True)

    def _seen(self, vector: Vector, layout: Layout, drawn: dict[str, Vector]) -> dict[str, Vector]:
        """What the server needs of a vector's products D: D itself, or D Q in "range" and T D in "core"."""
        if not self.sketch:
            return {"product": products(vector, layout)}
        ranges, cores = [], []
        for pair, (q_IS, t_LO) in zip(layout.lora_pairs(vector), self._tests(layout, drawn), strict=True):
            ranges.append((pair.scale * pair.b_OR @ (pair.a_RI @ q_IS)).flatten())
            cores.append((pair.scale * (t_LO @ pair.b_OR) @ pair.a_RI).flatten())
        return {"range": torch.cat(ranges), "core": torch.cat(cores)}

    def _factors(self, wanted: dict[str, Vector], layout: Layout, drawn: dict[str, Vector]) -> Iterator[Factors]:
        """U, S, V' of each pair's D, from itself or from its sketches."""
        if not self.sketch:
            for d_OI in layout.products(wanted["product"]):
                yield torch.linalg.svd(d_OI, full_matrices=False)
            return
        sizes = self._sizes(layout)
        ranges = unpacked(wanted["range"], [(o, s) for o, _, s, _ in sizes])
        cores = unpacked(wanted["core"], [(high, i) for _, i, _, high in sizes])
        for range_OS, core_LI, (_, t_LO) in zip(ranges, cores, self._tests(layout, drawn), strict=True):
            basis_OS = torch.linalg.qr(range_OS)[0]
            u_SS, s_S, v_SI = torch.linalg.svd(torch.linalg.pinv(t_LO @ basis_OS) @ core_LI, full_matrices=False)
            yield basis_OS @ u_SS, s_S, v_SI
