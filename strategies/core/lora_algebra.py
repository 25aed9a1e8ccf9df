"""What the LoRA rules share. Legend: P parameters, K clients, R rank, I inputs and O outputs of a layer."""

import torch

from strategies.core.layout import LORA_A, LORA_B, Layout, LoraPair
from strategies.core.protocol import Broadcast, Mask, Vector


def slices(layout: Layout, *markers: str) -> list[slice]:
    """Where the tensors with one of these markers in their names lie in the flat vector."""
    return [slice(first, last) for name, _, first, last in layout.places() if any(mark in name for mark in markers)]


def zeroed(x: torch.Tensor, layout: Layout, *markers: str) -> torch.Tensor:
    """The same vectors (P,) or (K, P), with zeros written where the tensors with these markers lie."""
    for place in slices(layout, *markers):
        x[..., place] = 0
    return x


def unmarked(layout: Layout, *markers: str) -> Mask:
    """The coordinates (P,) of all tensors but those with these markers."""
    return zeroed(torch.ones(layout.size, dtype=torch.bool), layout, *markers)


def without(x: torch.Tensor, layout: Layout, rows: slice) -> torch.Tensor:
    """The same vectors (P,) or (K, P), with zeros written into these rows of A and columns of B."""
    for pair in layout.lora_pairs(x):
        pair.a_RI[..., rows, :] = 0
        pair.b_OR[..., rows] = 0
    return x


def all_but(layout: Layout, rows: slice) -> Mask:
    """The coordinates (P,) of everything but these rows of A and columns of B."""
    return without(torch.ones(layout.size, dtype=torch.bool), layout, rows)


def products(vector: Vector, layout: Layout) -> Vector:
    """The products scale * B A of all LoRA pairs of the vector (P,), in the order of a merged delta."""
    return torch.cat([(pair.scale * pair.b_OR @ pair.a_RI).flatten() for pair in layout.lora_pairs(vector)])


def product_change(end: Vector, start: Vector, layout: Layout) -> Vector:
    """The products of one vector minus those of another; exactly zero where the vectors are equal."""
    return products(end, layout).sub_(products(start, layout))


def fold(broadcast: Broadcast) -> float:
    """s_k / s: the scale of a client of another rank, over the layout's."""
    layout, r_k = broadcast.layout, broadcast.lora_rank
    return 1.0 if r_k is None else layout.scale_at(r_k) / layout.scale


def start_at(broadcast: Broadcast, lora_rank: int | None) -> Vector:
    """The global vector as a client trains it, cut to `lora_rank` (None: whole); its B makes s_k B the global s B.

    Rows of A and columns of B that are both zero have zero gradients, so they stay zero in training.
    """
    layout = broadcast.layout
    vector = without(broadcast.params.clone(), layout, slice(lora_rank or layout.lora_rank, None))
    for pair in layout.lora_pairs(vector):
        pair.b_OR.div_(fold(broadcast))
    return vector


def folded(end: Vector, broadcast: Broadcast) -> Vector:
    """A client's vector with its scale folded into B, so that vectors of all ranks mean the same."""
    vector = end.clone()
    for pair in broadcast.layout.lora_pairs(vector):
        pair.b_OR.mul_(fold(broadcast))
    return vector


def floats_at(layout: Layout, lora_rank: int | None) -> int:
    """The number of elements of a vector with LoRA pairs of this rank (None: the layout's; 0: without pairs)."""
    adapters: int = sum(place.stop - place.start for place in slices(layout, LORA_A, LORA_B))
    kept = adapters if lora_rank is None else adapters * lora_rank // layout.lora_rank
    return layout.size - adapters + kept


def svd(pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V' of B A without the scale: at most R singular values, largest first. Factors R x R matrices only."""
    left_OR, left_RR = torch.linalg.qr(pair.b_OR)
    right_IR, right_RR = torch.linalg.qr(pair.a_RI.T)
    u_RR, s_R, v_RR = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    return left_OR @ u_RR, s_R, v_RR @ right_IR.T


def put(pair: LoraPair, b_OR: torch.Tensor, a_RI: torch.Tensor) -> None:
    """Writes the first R columns and rows into the pair, and zeros where there are fewer."""
    rank = min(pair.a_RI.shape[0], a_RI.shape[0])
    pair.b_OR.zero_()[:, :rank] = b_OR[:, :rank]
    pair.a_RI.zero_()[:rank] = a_RI[:rank]
