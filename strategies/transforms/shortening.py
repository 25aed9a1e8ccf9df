"""Fewer numbers: the largest coordinates, or a random projection that all clients of a round share.

Top-k (Stich et al. 2018, arXiv 1809.07599, algorithm 1); the count sketch (Weinberger et al. 2009, arXiv 0902.2206),
used on federated updates by FetchSGD (arXiv 2007.07682). Legend: P parameters, M coordinates that travel.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

from strategies.core.errors import require
from strategies.core.protocol import Aggregate, Broadcast, ServerState, Size, Vector
from strategies.core.ranges import SHARE, Range
from strategies.core.seeds import rng as stream
from strategies.transforms.chain import Lossy

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
        whole = x_P.numel() == broadcast.params.numel()
        require(whole, "a chain of transforms may hold one projection, not two: give the one the smaller share")
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
    """That share of so many values, at least one."""
    return max(1, round(share * values))


@lru_cache(maxsize=1)
def drawn(seed: int, round_: int, size: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket and the sign (P,) of each coordinate, the same for all clients of a round: a process draws once."""
    random = stream(seed, round_, -1, "projection")
    bucket_P = random.permutation(size) % kept
    sign_P = random.integers(0, 2, size, dtype=np.int8) * np.int8(2) - np.int8(1)
    return bucket_P, sign_P
