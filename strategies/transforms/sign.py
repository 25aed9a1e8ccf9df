"""Signs with the mean magnitude (Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1, EF-SignSGD).

Legend: P parameters, N blocks of B neighboring coordinates.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from strategies.core.protocol import Broadcast, Size, Vector
from strategies.transforms.chain import Lossy, blocks_of, check_block, with_scales


@dataclass(frozen=True)
class Sign(Lossy):
    """C(x) = sign(x) * |x|_1 / d in each block of d coordinates: one bit each, and a float32 for the block.

    Client state: the residual. A zero stays a zero and does not count in d, since it comes from a frozen tensor or from
    another transform, of which the receiver knows. The paper takes a layer for a block; here it is `block` neighboring
    coordinates. Trap: biased, so that without error feedback it need not converge, as the paper shows.
    """

    kind: Literal["sign"] = "sign"
    block: int = 1024

    def __post_init__(self) -> None:
        check_block("sign", self.block)

    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """Each block's mean magnitude with the signs."""
        x_NB = blocks_of(x_P, self.block)
        scale_N1 = x_NB.abs().sum(dim=1, keepdim=True) / x_NB.count_nonzero(dim=1)[:, None].clamp(min=1)
        sent = (x_NB.sign() * scale_N1).flatten()[: x_P.numel()]
        return sent, sent

    def size(self, size: Size) -> Size:
        """One bit a value and the scales."""
        return with_scales(size, 1, self.block)
