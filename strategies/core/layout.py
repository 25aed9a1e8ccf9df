"""Names and shapes of the trainable tensors inside one flat vector. Legend: R rank, I inputs, O outputs of a layer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

LORA_A, LORA_B = ".lora_A.", ".lora_B."  # as PEFT names them


@dataclass(frozen=True)
class LoraPair:
    """One adapted layer's matrices as views: its weight changes by scale * b_OR @ a_RI."""

    name: str
    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Layout:
    """The place of each trainable tensor in the flat vector: names, shapes, and the scale (alpha / r) of LoRA pairs.

    Tensors lie one after another in the order of `names`, without gaps; `size` is the vector's length P. `scales` has
    each pair's own scale where they differ. Where numbers stand for `choices` such as tokens, that many whole numbers
    from 0 are possible.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    scale: float = 1.0
    scales: tuple[float, ...] = ()
    choices: int = 0

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, torch.Tensor]], scale: float = 1.0) -> "Layout":
        """The layout of named tensors, in the order given."""
        listed = [(name, tuple(tensor.shape)) for name, tensor in tensors]
        return cls(tuple(name for name, _ in listed), tuple(shape for _, shape in listed), scale)

    @property
    def size(self) -> int:
        """P, the number of elements of all tensors together."""
        return sum(prod(shape) for shape in self.shapes)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of `flat` (P,) or (K, P) as the named tensors, which share its memory. ValueError if P differs."""
        if not flat.ndim or flat.shape[-1] != self.size:
            raise ValueError(f"this layout describes {self.size} elements, the vector has shape {tuple(flat.shape)}")
        return {n: flat[..., first:last].view((*flat.shape[:-1], *shape)) for n, shape, first, last in self.places()}

    def places(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Each tensor's name, shape, and interval (start, end) in the flat vector."""
        offset = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            yield name, shape, offset, offset + prod(shape)
            offset += prod(shape)

    @property
    def lora_rank(self) -> int:
        """The rank of the LoRA pairs, the largest where clients differ; 0 when the model is tuned in full."""
        return max((shape[0] for name, shape in zip(self.names, self.shapes, strict=True) if LORA_A in name), default=0)

    def scale_at(self, lora_rank: int) -> float:
        """alpha / lora_rank: the scale of the product on a client that has another rank than the layout's."""
        return self.scale * self.lora_rank / lora_rank

    @property
    def product_shapes(self) -> tuple[tuple[int, int], ...]:
        """(O, I) of each LoRA pair's product, in the order of `lora_pairs`: a merged delta holds them in a row."""
        shapes = dict(zip(self.names, self.shapes, strict=True))
        pairs = [(shapes[name.replace(LORA_A, LORA_B)], shapes[name]) for name in self.names if LORA_A in name]
        return tuple((b_OR[0], a_RI[1]) for b_OR, a_RI in pairs)

    @property
    def product_size(self) -> int:
        """The number of elements of all products together."""
        return sum(map(prod, self.product_shapes))

    def products(self, merged_delta: torch.Tensor) -> list[torch.Tensor]:
        """The matrices (O, I) of a `merged_delta`, as views."""
        return unpacked(merged_delta, self.product_shapes)

    def lora_pairs(self, flat: torch.Tensor) -> Iterator[LoraPair]:
        """The LoRA pairs of `flat` (P,) or (K, P) as views; none when the model is tuned in full."""
        views = self.views(flat)
        names = [name for name in self.names if LORA_A in name]
        for name, scale in zip(names, self.scales or (self.scale,) * len(names), strict=True):
            yield LoraPair(name.split(LORA_A)[0], views[name], views[name.replace(LORA_A, LORA_B)], scale)


def unpacked(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """The tensors of these shapes that lie one after another in `flat`, as views."""
    flats = flat.split([prod(shape) for shape in shapes])
    return [each.view(shape) for each, shape in zip(flats, shapes, strict=True)]
