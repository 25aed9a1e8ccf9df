"""FlexLoRA: the average of the products, given out by SVD at each client's rank (Bai et al. 2024, arXiv 2402.11505).

Legend: P parameters, R rank, I inputs and O outputs of a layer, S and L columns and rows of its sketches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import AveragingRule
from strategies.core.errors import require
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import (
    count,
    floats_at,
    folded,
    product_size,
    products,
    put,
    start_at,
    unmarked,
    without,
)
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector
from strategies.core.seeds import torch_rng

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FlexLora(AveragingRule):
    """D = sum_k p_k s_k B_k A_k; U S V' = SVD(D), cut to the largest rank; B <- U S / s, A <- V'.

    A client of rank r_k gets the first r_k rows and columns, under its own scale. It sends the difference between its
    product and the round's D, and D moves by lr times the mean of that: zeros move nothing, so that differential
    privacy may clip them and divide by the expected cohort. Reads sums. The result is exact where the largest rank is
    the layers' full rank, else the best approximation of D. With mixed ranks a client's product lacks everything beyond
    its rank, and D loses its share of that.

    `sketch` = 0: clients send the dense products' changes. Above 0: with shared random Q (I, S) and T (L, O),
    S = rank + sketch, L = 2 S + 1, they send X Q and T X for their change X, which are sums as well and far smaller
    than X; the server finds D's range from the first and D in it from the second (Tropp et al. 2017, arXiv 1609.00048),
    then its SVD. That is an approximation where D's rank exceeds S. Traps: A and B are other factors each round, so a
    kept optimizer state means nothing; the paper takes one scale for all clients, which mixed ranks do not have.
    """

    kind: Literal["flexlora"] = "flexlora"
    sketch: int = 0
    needs_lora: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = False
    sends_products: ClassVar[bool] = True
    extras_are_changes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2402.11505"

    def __post_init__(self) -> None:
        super().__post_init__()
        columns = "strategy.sketch is the number of columns beyond the rank and must be at least 0"
        require(self.sketch >= 0, f"{columns}, not {self.sketch}")

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector, and the round's random matrices for sketches, although the seed determines them."""
        return replace(super().broadcast(state), extras=self._drawn(state) if self.sketch else {})

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector cut to the client's rank."""
        return {GLOBAL: start_at(broadcast, broadcast.rank)}

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sends the weighted change of the product, or its sketches, instead of the adapters' changes."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        before = self._seen(broadcast.params, broadcast.layout, broadcast.extras)
        after = self._seen(folded(broadcast.params + update.delta, broadcast), broadcast.layout, broadcast.extras)
        extras = {name: update.weight * (after[name] - before[name]) for name in before}
        delta = without(update.delta, broadcast.layout, LORA_A, LORA_B)
        return replace(update, delta=delta, extras=extras), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """The products' changes, or sketches of them."""
        if not self.sketch:
            return {"product": product_size(layout)}
        shapes = list(zip(layout.product_shapes, self._sizes(layout), strict=True))
        return {
            "range": sum(outputs * wide for (outputs, _), (wide, _) in shapes),
            "core": sum(high * inputs for (_, inputs), (_, high) in shapes),
        }

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the adapters, whose products travel beside."""
        return {"delta": unmarked(layout, LORA_A, LORA_B)}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """Every coordinate."""
        return None

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The client's own adapters down; up as well, or the sketches."""
        down = floats_at(broadcast.layout, broadcast.rank)
        if not self.sketch:
            return down, down
        sizes = zip(broadcast.layout.product_shapes, self._sizes(broadcast.layout), strict=True)
        sketches = sum(outputs * columns + rows * inputs for (outputs, inputs), (columns, rows) in sizes)
        return down, broadcast.layout.size - count(broadcast.layout, LORA_A, LORA_B) + sketches

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The SVD of the product and its mean change gives the new adapters; all other tensors as in FedAvg."""
        moved = super().apply(state, aggregate)
        if not any(extra.any() for extra in aggregate.extras.values()):
            return moved  # other factors of the same product would only add their rounding
        drawn = self._drawn(state) if self.sketch else {}
        wanted = {
            name: before + aggregate.extras[name] * (self.lr / aggregate.weight)
            for name, before in self._seen(state.params, state.layout, drawn).items()
        }
        params = moved.params.clone()
        for pair, (u_OR, s_R, v_RI) in zip(
            state.layout.lora_pairs(params), self._factors(wanted, state.layout, drawn), strict=True
        ):
            put(pair, u_OR * s_R / pair.scale, v_RI)
        return replace(moved, params=params)

    def _sizes(self, layout: Layout) -> list[tuple[int, int]]:
        """(S, L) of each pair; a sketch is never larger than the product."""
        columns = [min(layout.rank + self.sketch, *shape) for shape in layout.product_shapes]
        return [(wide, min(2 * wide + 1, shape[0])) for wide, shape in zip(columns, layout.product_shapes, strict=True)]

    def _drawn(self, state: ServerState) -> dict[str, Vector]:
        """The round's Q (I, S) and T (L, O) of all pairs, flat: orthonormal columns and rows."""
        stream = torch_rng(state.seed, state.round, -1, "sketch")
        columns, rows = [], []
        for (outputs, inputs), (wide, high) in zip(state.layout.product_shapes, self._sizes(state.layout), strict=True):
            columns.append(torch.linalg.qr(torch.randn(inputs, wide, generator=stream))[0].flatten())
            rows.append(torch.linalg.qr(torch.randn(outputs, high, generator=stream))[0].T.flatten())
        return {"columns": torch.cat(columns), "rows": torch.cat(rows)}

    def _tests(self, layout: Layout, drawn: dict[str, Vector]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Q (I, S) and T (L, O) of one pair after another."""
        shapes = list(zip(layout.product_shapes, self._sizes(layout), strict=True))
        columns = unpacked(drawn["columns"], [(inputs, wide) for (_, inputs), (wide, _) in shapes])
        rows = unpacked(drawn["rows"], [(high, outputs) for (outputs, _), (_, high) in shapes])
        return zip(columns, rows, strict=True)

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
        shapes = list(zip(layout.product_shapes, self._sizes(layout), strict=True))
        ranges = unpacked(wanted["range"], [(outputs, wide) for (outputs, _), (wide, _) in shapes])
        cores = unpacked(wanted["core"], [(high, inputs) for (_, inputs), (_, high) in shapes])
        for range_OS, core_LI, (_, t_LO) in zip(ranges, cores, self._tests(layout, drawn), strict=True):
            basis_OS = torch.linalg.qr(range_OS)[0]
            u_SS, s_S, v_SI = torch.linalg.svd(torch.linalg.pinv(t_LO @ basis_OS) @ core_LI, full_matrices=False)
            yield basis_OS @ u_SS, s_S, v_SI


def unpacked(flat: Vector, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The matrices that lie one after another in `flat`, as views."""
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
