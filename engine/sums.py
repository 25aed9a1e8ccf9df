"""The exact sum: weighted updates on a fixed grid of int64, the same bits whatever the order. Legend: P parameters.

A value x with weight w is rounded to the grid step 2^-40; integers add without rounding, so any order of clients,
chunks and slots gives one result. Ranges are checked before the cast, where NaN and overflow would all become the
smallest integer.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from strategies.partition import Partition
from strategies.types import Aggregate, Update

STEP = 2.0**40
LIMIT = 2.0**22  # of sum w |x|: half of int64's room, so that no merge of checked partial sums can wrap
BLOCK = 32_768  # elements at a time: the float64 intermediate stays in the cache
NEAREST = 1.5 * 2.0**52  # from 2^52 on doubles are 1 apart: what is added to it is rounded, and stands in its last bits
NEAREST_BITS = np.float64(NEAREST).view(np.int64)  # which stand in it too, and are taken out of a sum when it closes
ROOM = 2.0**51 / STEP  # of values that it can be done with


class NonFiniteUpdate(ValueError):
    """An update holds NaN or infinity, or is as good as infinite, so that it has no place in a sum."""


@dataclass(frozen=True)
class PartialSum:
    """A slot's part of a round: sums on the grid (int64), the sum of weights on the grid, and how many clients.

    `bound` is the sum of weight * max |x|, from which overflow is judged.
    """

    vectors: dict[str, np.ndarray]
    weight: int
    count: int
    bound: float

    @property
    def nbytes(self) -> int:
        """What its vectors take in the object store."""
        return sum(vector.nbytes for vector in self.vectors.values())


class ExactSum:
    """Adds clients' updates in place; `close` hands the partial sum over and starts again at nothing."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self.vectors: dict[str, np.ndarray] = {}
        self.nearest: Counter[str] = Counter()  # how often a vector has NEAREST_BITS in it
        self.weight, self.count, self.bound = 0, 0, 0.0

    def add(self, update: Update) -> None:
        """Adds weight * delta and the unweighted extras.

        Raises NonFiniteUpdate, and ValueError where all together leave the grid's range; the sum is then as before.
        """
        assert "delta" not in update.extras and update.delta.ndim == 1
        tensors = {"delta": (update.delta, update.weight)}
        tensors |= {name: (extra, 1.0) for name, extra in update.extras.items()}
        own = finite_bound(update)
        if own >= LIMIT:
            raise NonFiniteUpdate(f"its update reaches {own:.3g}, beyond the exact sum's range of {LIMIT:.3g}")
        bound = self.bound + own
        _check(bound)
        self.bound = bound
        for name, (tensor, weight) in tensors.items():
            if name not in self.vectors:
                self.vectors[name] = np.zeros(tensor.numel(), np.int64)
            self.nearest[name] += _add_on_grid(self.vectors[name], tensor.detach().numpy(), weight, own)
        self.weight += round(update.weight * STEP)
        self.count += 1

    def close(self) -> PartialSum:
        """The sum of all that was added since the last close."""
        for name, often in self.nearest.items():
            # Integers come round: no sum is too large for it.
            self.vectors[name] -= np.uint64(often * int(NEAREST_BITS) % 2**64).view(np.int64)
        partial = PartialSum(self.vectors, self.weight, self.count, self.bound)
        self._empty()
        return partial


def finite_bound(update: Update) -> float:
    """weight * max |delta| + the extras' own maxima; NonFiniteUpdate if a value or the weight is NaN or infinite."""
    bound = update.weight * _peak(update.delta) + sum(_peak(extra) for extra in update.extras.values())
    if not np.isfinite([update.weight, bound]).all():
        raise NonFiniteUpdate("its update holds NaN or infinity")
    return bound


def _peak(tensor: torch.Tensor) -> float:
    if not tensor.numel():
        return 0.0
    least, most = tensor.aminmax()  # without a copy, and NaN where there is any
    return max(abs(float(least)), abs(float(most)))


def merge(partials: list[PartialSum]) -> Aggregate:
    """The sum over all slots as float32 vectors; ValueError when no client contributed or the grid's range is left."""
    partials = [partial for partial in partials if partial.count]
    if not partials:
        raise ValueError("no client of the cohort gave an update, so there is nothing to average")
    _check(sum(partial.bound for partial in partials))
    totals = {}
    for name, first in partials[0].vectors.items():
        total_P = np.empty(len(first), np.float32)
        for start in range(0, len(first), BLOCK):  # the wide integers stay in the cache
            block = slice(start, start + BLOCK)
            total_P[block] = sum(partial.vectors[name][block] for partial in partials) / STEP
        totals[name] = torch.from_numpy(total_P)
    weight = sum(partial.weight for partial in partials) / STEP
    return Aggregate(weight, totals.pop("delta"), totals, sum(partial.count for partial in partials))


def cut(partial: PartialSum, partition: Partition, rank: int) -> PartialSum:
    """A rank's shard of a sum of whole vectors; what is not as long as delta each rank has whole, as gangs have it."""
    vectors = dict(partial.vectors)
    whole = sum(map(partition.length, range(len(partition.parts))))
    for name, vector in partial.vectors.items():
        if len(vector) == whole:
            vectors[name] = partition.cut(torch.from_numpy(vector), rank).numpy()
    return PartialSum(vectors, partial.weight, partial.count, partial.bound)


def _add_on_grid(total_P: np.ndarray, values_P: np.ndarray, weight: float, largest: float) -> bool:
    """Adds weight * values, none of which is beyond `largest`, rounded to even where two steps are as near.

    True: NEAREST_BITS are still in each sum. That is faster than a conversion, which is bound by the processor.
    """
    scale, roomy = np.float64(weight * STEP), largest < ROOM
    steps_B = np.empty(min(BLOCK, len(total_P)), np.float64)
    for start in range(0, len(total_P), BLOCK):
        block = slice(start, start + BLOCK)
        steps = steps_B[: len(total_P) - start]
        steps[:] = values_P[block]
        steps *= scale
        if roomy:
            steps += NEAREST
            total_P[block] += steps.view(np.int64)
        else:
            total_P[block] += np.rint(steps).astype(np.int64)
    return roomy


def _check(bound: float) -> None:
    if bound >= LIMIT:
        raise ValueError(
            f"the sum of weight * |update| reaches {bound:.3g}, beyond the exact sum's range of {LIMIT:.3g}: "
            f"training diverged, or weights are far above 1"
        )
