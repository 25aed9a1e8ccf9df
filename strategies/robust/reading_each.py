"""What rules share that read each update: they check the number of updates and work in blocks of coordinates.

Legend: K clients, P parameters, B the coordinates of a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

from strategies.core.base import AveragingRule, Reads, named
from strategies.core.errors import StrategyError
from strategies.core.protocol import Aggregate, ServerState, Update, Vector
from strategies.core.ranges import Range

ELEMENTS = 2**21  # of a block, over all clients: what is in memory at once does not grow with K or P


@dataclass(frozen=True)
class RobustRule(AveragingRule, ABC):
    """theta += lr * combine(delta_1, ..., delta_K). Reads each update.

    Every client weighs the same: its number of rows is its own claim, which an attacker would make large. On LoRA the
    rule sees A and B as coordinates, not their product.
    """

    weighting: Literal["uniform"] = "uniform"
    reads: ClassVar[Reads] = "each"
    elementwise: ClassVar[bool] = False

    @abstractmethod
    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The rule itself: one vector (P,) from those of the clients."""

    def way_out(self, count: int) -> str:
        """The setting that makes the rule work with so many updates."""
        return "take another strategy"

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr * combine(deltas)."""
        step = self.combine([update.delta for update in enough(self, aggregate)])
        return replace(state, round=state.round + 1, params=state.params + self.lr * step)


@dataclass(frozen=True)
class ByzantineRule(RobustRule, ABC):
    """A robust rule that holds against any `f` of the cohort's clients, whatever they send."""

    f: Annotated[int, Range("is the number of clients that may lie")] = 1

    def way_out(self, count: int) -> str:
        """The largest f that the rule allows for so many updates."""
        fits = [f for f in range(self.f) if replace(self, f=f).smallest_cohort() <= count]
        return f"set strategy.f = {fits[-1]}" if fits else super().way_out(count)


def enough(strategy: RobustRule, aggregate: Aggregate) -> tuple[Update, ...]:
    """The updates; StrategyError with the way out when they are fewer than the rule needs."""
    assert aggregate.each is not None
    count, needed = len(aggregate.each), strategy.smallest_cohort()
    if count < needed:
        raise StrategyError(
            f"{named(strategy)} as set needs the updates of at least {needed} clients a round, but {count} came: raise "
            f"cohort.size so that {needed} always come, or {strategy.way_out(count)}"
        )
    return aggregate.each


def blocks(deltas: Sequence[Vector]) -> Iterator[tuple[slice, torch.Tensor]]:
    """The coordinates block by block: where the block lies, and a copy of it (K, B)."""
    length = max(1, ELEMENTS // len(deltas))
    for start in range(0, deltas[0].numel(), length):
        part = slice(start, start + length)
        yield part, torch.stack([delta[part] for delta in deltas])


def by_coordinate(deltas: Sequence[Vector], rule: Callable[[torch.Tensor], torch.Tensor]) -> Vector:
    """The vector (P,) of `rule` on every block (K, B) of the clients' vectors."""
    combined = torch.empty_like(deltas[0])
    for part, x_KB in blocks(deltas):
        combined[part] = rule(x_KB)
    return combined


def sorted_rows(x_KB: torch.Tensor) -> torch.Tensor:
    """Every coordinate's values in rising order; numpy sorts short columns several times faster than torch."""
    return torch.from_numpy(np.sort(x_KB.numpy(), axis=0))


def mean_of_rows(x_KB: torch.Tensor) -> torch.Tensor:
    """The mean over K, added up row by row in float64: the same bits wherever a block begins."""
    total_B = torch.zeros(x_KB.shape[1], dtype=torch.float64)
    for row_B in x_KB:
        total_B += row_B
    return (total_B / len(x_KB)).float()


def squared_distances(deltas: Sequence[Vector]) -> torch.Tensor:
    """|delta_i - delta_j|^2 for all pairs (K, K), in float64 from products of blocks.

    Not centered: an attacker's huge vector would then drown the honest ones' distances. This way the error of a pair is
    1e-16 of that pair's own squared norms.
    """
    products_KK = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for _, x_KB in blocks(deltas):
        x_KB = x_KB.double()
        products_KK += x_KB @ x_KB.T
    norms_K = products_KK.diagonal()
    return (norms_K[:, None] + norms_K[None, :] - 2 * products_KK).clamp_(min=0)
