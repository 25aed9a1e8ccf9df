"""FlexLoRA: the average of the products, given out by SVD at each client's rank (Bai et al. 2024, arXiv 2402.11505).

Legend: P parameters, R rank, I inputs and O outputs of a layer, S and L columns and rows of its sketches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.layout import Layout, unpacked
from strategies.core.lora_algebra import floats_at, products, put
from strategies.core.protocol import Aggregate, Broadcast, ServerState, Vector
from strategies.core.ranges import Range
from strategies.core.seeds import torch_rng
from strategies.lora.products import ProductRule

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FlexLora(ProductRule):
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
        down = floats_at(broadcast.layout, broadcast.rank)
        return down, super().floats(broadcast)[1] if self.sketch else down

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
        factors = self._factors(wanted, state.layout, drawn)
        for pair, (u_OR, s_R, v_RI) in zip(state.layout.lora_pairs(params), factors, strict=True):
            put(pair, u_OR * s_R / pair.scale, v_RI)
        return replace(moved, params=params)

    def _sizes(self, layout: Layout) -> list[tuple[int, int, int, int]]:
        """(O, I, S, L) of each pair; a sketch is never larger than the product."""
        shapes = [(o, i, min(layout.rank + self.sketch, o, i)) for o, i in layout.product_shapes]
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
