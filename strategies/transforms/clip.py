"""Norm clipping: no update is longer than a bound (Sun et al. 2019, arXiv 1911.07963)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import Finished
from strategies.core.protocol import Broadcast, ClientState, Update
from strategies.core.ranges import ABOVE_0, Range
from strategies.transforms.chain import Transform


@dataclass(frozen=True)
class Clip(Transform):
    """delta <- delta * min(1, bound / |delta|), the L2 norm of the whole vector.

    It bounds what one client can do to a sum, so it goes with rules that read the sum alone. Extras are left as they
    are. Traps: the clients themselves clip, so against those that lie it helps only if somebody checks. Transforms
    after it in the chain may lengthen the update again (error feedback, projection); as the last one it always holds.
    """

    kind: Literal["clip"] = "clip"
    bound: Annotated[float, Range("is the largest L2 norm", ABOVE_0)] = 1.0
    works_on_shards: ClassVar[bool] = True

    def encode(self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator) -> Finished:
        """The delta, shortened if it is too long."""
        norm = broadcast.whole_norm(float(torch.linalg.vector_norm(update.delta, dtype=torch.float64)))
        return (update if norm <= self.bound else replace(update, delta=update.delta * (self.bound / norm))), {}
