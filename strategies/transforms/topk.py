"""Top-k: only the largest coordinates travel (Stich et al. 2018, arXiv 1809.07599, algorithm 1)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.protocol import Broadcast, Size, Vector
from strategies.transforms.chain import Lossy, Share, share_of


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
