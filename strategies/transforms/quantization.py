"""Eight bits or one a coordinate, with a scale for each block. Legend: P parameters, N blocks of B coordinates."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F

from strategies.core.protocol import Broadcast, Size, Vector
from strategies.core.ranges import AT_LEAST_1, Range
from strategies.transforms.chain import Lossy


@dataclass(frozen=True)
class Blockwise(Lossy, ABC):
    """A quantization of blocks of `block` neighboring coordinates, each with a float32 scale. Zeros stay zeros."""

    block: Annotated[int, Range("is the number of coordinates that share a scale", AT_LEAST_1)] = 1024
    bits: ClassVar[int]  # of a value

    @abstractmethod
    def quantized(self, x_NB: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """The values (N, B) that the bits stand for."""

    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """The values on each block's grid."""
        x_NB = F.pad(x_P, (0, -x_P.numel() % self.block)).view(-1, self.block)
        sent = self.quantized(x_NB, rng).flatten()[: x_P.numel()]
        return sent, sent

    def size(self, size: Size) -> Size:
        """The bits, and a scale for each block, or for each value if these are fewer."""
        scales = min(size.values, -(-size.length // self.block))
        return replace(size, bits=min(size.bits, self.bits), extra=size.extra + 32 * scales)


@dataclass(frozen=True)
class Int8(Blockwise):
    """C(x) = s q with s = max|x| / 127 in each block and q = x / s rounded up with the probability of its fraction.

    QSGD (Alistarh et al. 2017, arXiv 1610.02132), scaled by the maximum. Unbiased: E[C(x)] = x. Client state: the
    residual, less than a rounding step. The server adds the values that the integers stand for.
    """

    kind: Literal["int8"] = "int8"
    bits: ClassVar[int] = 8

    def quantized(self, x_NB: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Multiples of 1/127 of each block's largest value, rounded at random."""
        scale_N1 = x_NB.abs().amax(dim=1, keepdim=True) / 127
        level_NB = x_NB / torch.where(scale_N1 > 0, scale_N1, 1)
        low_NB = level_NB.floor()
        up_NB = torch.rand(x_NB.shape, generator=rng) < level_NB - low_NB
        return (low_NB + up_NB).clamp(-127, 127) * scale_N1


@dataclass(frozen=True)
class Sign(Blockwise):
    """C(x) = sign(x) * |x|_1 / d in each block of d coordinates: one bit each, and a float32 for the block.

    EF-SignSGD (Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1). Client state: the residual. A zero does not
    count in d, since it comes from a frozen tensor or from another transform, of which the receiver knows. The paper
    takes a layer for a block. Trap: biased, so that without error feedback it need not converge, as the paper shows.
    """

    kind: Literal["sign"] = "sign"
    bits: ClassVar[int] = 1

    def quantized(self, x_NB: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Each block's mean magnitude with the signs."""
        scale_N1 = x_NB.abs().sum(dim=1, keepdim=True) / x_NB.count_nonzero(dim=1)[:, None].clamp(min=1)
        return x_NB.sign() * scale_N1
