"""Transforms that lose a part of the update: fewer bits a coordinate, fewer coordinates, or a random projection.

Legend: P parameters, N blocks of B neighboring coordinates, M coordinates that travel.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F

from strategies.core.base import Finished
from strategies.core.errors import require
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Size, Update, Vector
from strategies.core.ranges import AT_LEAST_1, SHARE, Range
from strategies.core.seeds import rng as stream
from strategies.transforms.chain import Transform

ERROR = "error"  # the name of the residual in a transform's part of the client's state


@dataclass(frozen=True)
class Lossy(Transform, ABC):
    """A transform that loses a part of the update and, with error feedback, sends it later.

    The client keeps the residual e: it sends C(delta + e) and keeps e <- delta + e - C(delta + e), so that over the
    rounds the sum of what arrived is the sum of the deltas minus the last e. A coordinate that did not move this round
    (frozen by the rule, or beyond the client's rank) sends nothing, and its residual waits: a frozen tensor stays where
    it is. Trap: a residual is sent when the client next takes part, which in a large population is late or never.
    """

    error_feedback: bool = True

    @abstractmethod
    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """What travels in place of the vector, and what the server makes of that, (P,)."""

    @property
    def keeps_state(self) -> bool:
        """The residual, with error feedback."""
        return self.error_feedback

    def encode(self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator) -> Finished:
        """The squeezed delta with the residual of earlier rounds in it, and the new residual."""
        if not self.error_feedback:
            return replace(update, delta=self.squeeze(update.delta, broadcast, rng)[0]), {}
        delta_P = update.delta
        error_P = client_state.get(ERROR, torch.zeros_like(delta_P))
        sent, seen_P = self.squeeze(torch.where(delta_P == 0, 0, delta_P + error_P), broadcast, rng)
        return replace(update, delta=sent), {ERROR: delta_P + error_P - seen_P}


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


Share = Annotated[float, Range("is what is kept of the update", SHARE)]


@dataclass(frozen=True)
class TopK(Lossy):
    """C(x) keeps the `share` of the coordinates that are largest in magnitude, the others are zero.

    Client state: the residual. The share is of the coordinates that are not zero: a frozen tensor takes no room. The
    client sends the values and their positions, as numbers or as a bit map, whichever is shorter. Traps: biased, so
    that without error feedback small coordinates are never learned; clients keep different coordinates, so that
    secure sums are refused: they would be no shorter, and might show a coordinate of one client alone.
    """

    kind: Literal["topk"] = "topk"
    share: Share = 0.1
    picks_coordinates: ClassVar[bool] = True

    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """The vector with zeros except for the largest coordinates."""
        kept = share_of(self.share, int(x_P.count_nonzero()))
        where = x_P.abs().topk(kept, sorted=False).indices
        sent = torch.zeros_like(x_P)
        sent[where] = x_P[where]
        return sent, sent

    def size(self, size: Size) -> Size:
        """The kept values and their positions."""
        kept = share_of(self.share, size.values)
        positions = min(kept * (size.length - 1).bit_length(), size.length) if kept < size.values else 0
        return replace(size, values=kept, extra=size.extra + positions)


@dataclass(frozen=True)
class Projection(Lossy):
    """y = S x: each coordinate is added to one of M = `share` P buckets with a random sign; the server takes S' y.

    S has one +-1 in each column and comes from (seed, round), so that it commutes with the sum and nobody sends it; the
    buckets are equally full, up to one. Without error feedback S' S is unbiased, E[S' S] = I, but multiplies the
    squared norm by about 1 / share: lower the learning rate. With it each bucket is divided by its number of
    coordinates, which makes the orthogonal projection S' (S S')^-1 S that error feedback needs to converge; the rest is
    sent in later rounds under other S. Client state: the residual.

    Traps: zeros do not stay zeros, hence it is not for rules that freeze tensors nor for mixed ranks. It is the only
    transform that changes the length, so a chain has one at most. Rules that read each update get them decoded, all in
    memory. It takes 9 bytes a parameter on every slot.
    """

    keeps_zeros: ClassVar[bool] = False
    kind: Literal["projection"] = "projection"
    share: Share = 0.1

    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """The buckets (M,), and their way back (P,)."""
        uncut = x_P.numel() == broadcast.params.numel()
        require(uncut, "a chain of transforms may hold one projection, not two: give the one the smaller share")
        bucket_P, sign_P = drawn(broadcast.seed, broadcast.round, x_P.numel(), share_of(self.share, x_P.numel()))
        buckets = np.bincount(bucket_P, x_P.numpy() * sign_P, share_of(self.share, x_P.numel()))
        sent = torch.from_numpy(buckets.astype(np.float32))
        return sent, self.back(sent, broadcast.seed, broadcast.round, x_P.numel())

    def back(self, y_M: torch.Tensor, seed: int, round_: int, size: int) -> Vector:
        """S' y, or S' (S S')^-1 y with error feedback."""
        bucket_P, sign_P = drawn(seed, round_, size, y_M.numel())
        if self.error_feedback:
            y_M = y_M / torch.from_numpy(np.bincount(bucket_P, minlength=y_M.numel()))
        return torch.from_numpy(y_M.numpy()[bucket_P] * sign_P)

    def decode(self, aggregate: Aggregate, state: ServerState, rng: torch.Generator) -> tuple[Aggregate, ServerState]:
        """The total, and each update where the rule reads them, back at full length."""

        def back(y_M: torch.Tensor) -> Vector:
            return self.back(y_M, state.seed, state.round, state.params.numel())

        each = aggregate.each and tuple(replace(update, delta=back(update.delta)) for update in aggregate.each)
        return replace(aggregate, total=back(aggregate.total), each=each), state

    def size(self, size: Size) -> Size:
        """M float32 numbers."""
        kept = share_of(self.share, size.length)
        return Size(kept, kept)


def share_of(share: float, values: int) -> int:
    """The number of values that are the `share` of all, at least one."""
    return max(1, round(share * values))


@lru_cache(maxsize=1)
def drawn(seed: int, round_: int, size: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket and the sign (P,) of each coordinate, the same for all clients of a round: a process draws once."""
    random = stream(seed, round_, -1, "projection")
    bucket_P = random.permutation(size) % kept
    sign_P = random.integers(0, 2, size, dtype=np.int8) * np.int8(2) - np.int8(1)
    return bucket_P, sign_P
