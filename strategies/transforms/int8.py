"""8-bit integers with stochastic rounding (QSGD, Alistarh et al. 2017, arXiv 1610.02132, scaled by the maximum).

Legend: P parameters, N blocks of B neighboring coordinates.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from strategies.core.protocol import Broadcast, Size, Vector
from strategies.transforms.chain import Lossy, blocks_of, check_block, with_scales


@dataclass(frozen=True)
class Int8(Lossy):
    """C(x) = s q with s = max|x| / 127 in each block and q = x / s rounded up with the probability of its fraction.

    Unbiased: E[C(x)] = x. Client state: the residual, less than a rounding step. A block is `block` neighboring
    coordinates and costs one float32. The server adds the values that the integers stand for. Zeros stay zeros.
    """

    kind: Literal["int8"] = "int8"
    block: int = 1024

    def __post_init__(self) -> None:
        check_block("int8", self.block)

    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """The values on each block's grid."""
        x_NB = blocks_of(x_P, self.block)
        scale_N1 = x_NB.abs().amax(dim=1, keepdim=True) / 127
        level_NB = x_NB / torch.where(scale_N1 > 0, scale_N1, 1)
        low_NB = level_NB.floor()
        up_NB = torch.rand(x_NB.shape, generator=rng) < level_NB - low_NB
        sent = ((low_NB + up_NB).clamp(-127, 127) * scale_N1).flatten()[: x_P.numel()]
        return sent, sent

    def size(self, size: Size) -> Size:
        """8 bits a value and the scales."""
        return with_scales(size, 8, self.block)
