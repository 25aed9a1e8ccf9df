"""What a process asks of the ranks that it is one worker with. A single process is a group of one."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Peers:
    """Figures over all ranks of a worker, which must all ask at the same time; `rank` is None in a group of one."""

    rank: int | None = None
    summed: Callable[[float], float] = float
    largest: Callable[[float], float] = float

    def whole_norm(self, norm: float) -> float:
        """Returns the L2 norm of a vector from that of the shard at hand."""
        return norm if self.rank is None else math.sqrt(self.summed(norm * norm))


ALONE = Peers()
