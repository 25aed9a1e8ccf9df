"""The exact sum: weighted updates on a fixed grid of int64, the same bits whatever the order. Legend: P parameters.

A value x with weight w is rounded to the grid step 2^-40; integers add without rounding, so any order of clients,
chunks and slots gives one result. Ranges are checked before the cast, where NaN and overflow would all become the
smallest integer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from strategies.core.protocol import Aggregate, Update
from strategies.core.sharding import Partition

STEP = 2.0**40
LIMIT = 2.0**22  # of sum w |x|: half of int64's room, so that no merge of checked partial sums can wrap
BLOCK = 65_536  # elements at a time: what is made of them stays in the cache
NEAREST = 1.5 * 2.0**52  # from 2^52 on doubles are 1 apart: what is added to it is rounded, and stands in its last bits
NEAREST_BITS = np.float64(NEAREST).view(np.int64)  # which stand in it too, and are taken out of a sum when it closes
ROOM = 2.0**51 / STEP  # of values that it can be done with


NOT_FINITE = "its update holds NaN or infinity"


class NonFiniteUpdate(ValueError):
    """An update holds NaN or infinity, or is as good as infinite, so that it has no place in a sum."""


@dataclass(frozen=True)
class PartialSum:
    """A slot's part of a round: sums on the grid (int64), the sum of weights on the grid, and how many clients.

    `bound` is the sum of weight * max |x|, from which overflow is judged. `lengths` are those of the whole vectors, of
    which `vectors` may be a stretch.
    """

    vectors: dict[str, np.ndarray]
    weight: int
    count: int
    bound: float
    lengths: dict[str, int]

    @property
    def nbytes(self) -> int:
        """What its vectors take in the object store."""
        return sum(vector.nbytes for vector in self.vectors.values())


class OnGrid:
    """One vector's running sum in steps of the grid (P,), worked on in blocks."""

    def __init__(self, length: int) -> None:
        self.steps_P = np.zeros(length, np.int64)
        self.nearest = [0] * -(-length // BLOCK)  # how often a block has NEAREST_BITS in it
        self.scratch_B = np.empty(min(BLOCK, length))

    def add(self, values_P: np.ndarray, weight: float, limit: float) -> float:
        """Adds weight * values (P,) and returns the largest |weight * value|; where that is not below `limit`, nothing.

        Large vectors are read once for both: memory is slower than what is done to them.
        """
        largest = 0.0
        for block, values_B in enumerate(_blocks(values_P)):
            reached = weight * _peak(values_B)
            if not reached < limit:  # NaN is not
                self.take_out(values_P[: block * BLOCK], weight)
                return reached
            self._put(np.add, block, values_B, weight, reached)
            largest = max(largest, reached)
        return largest

    def take_out(self, values_P: np.ndarray, weight: float) -> None:
        """Undoes an addition: integers are then what they were, bit for bit."""
        for block, values_B in enumerate(_blocks(values_P)):
            self._put(np.subtract, block, values_B, weight, weight * _peak(values_B))

    def _put(self, put: np.ufunc, block: int, values_B: np.ndarray, weight: float, reached: float) -> None:
        """Rounds to even where two steps are as near."""
        sum_B, steps_B = self.steps_P[block * BLOCK :][: len(values_B)], self.scratch_B[: len(values_B)]
        steps_B[:] = values_B
        steps_B *= weight * STEP
        if reached < ROOM:  # faster than a conversion, which is bound by the processor
            steps_B += NEAREST
            self.nearest[block] += 1 if put is np.add else -1
            put(sum_B, steps_B.view(np.int64), out=sum_B)
        else:
            put(sum_B, np.rint(steps_B).astype(np.int64), out=sum_B)

    def stretch(self, first: int, size: int) -> np.ndarray:
        """So many steps of the sum from the block that begins at `first`: a view, until something is added."""
        stretch = self.steps_P[first : first + size]
        for block, sum_B in enumerate(_blocks(stretch), first // BLOCK):
            # Integers come round: no sum is too large for it.
            sum_B -= np.uint64(self.nearest[block] * int(NEAREST_BITS) % 2**64).view(np.int64)
            self.nearest[block] = 0
        return stretch


class ExactSum:
    """Adds clients' updates in place; `part` shows the sum, `close` hands it over and starts again at nothing."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self.vectors: dict[str, OnGrid] = {}
        self.weight, self.count, self.bound = 0, 0, 0.0

    def add(self, update: Update) -> None:
        """Adds weight * delta and the unweighted extras.

        Raises NonFiniteUpdate, and ValueError where all together leave the grid's range; the sum is then as before.
        """
        assert "delta" not in update.extras and update.delta.ndim == 1
        if not np.isfinite(update.weight):
            raise NonFiniteUpdate(NOT_FINITE)
        tensors = {"delta": update.delta, **update.extras}
        for name, tensor in tensors.items():
            if name not in self.vectors:
                self.vectors[name] = OnGrid(tensor.numel())
            length = len(self.vectors[name].steps_P)
            if length != tensor.numel():
                raise ValueError(
                    f"{name!r} has {tensor.numel()} values for client {update.client}, and {length} for others: what a "
                    f"strategy adds up must be of one length"
                )
        own, added = 0.0, list[tuple[OnGrid, np.ndarray, float]]()
        for name, tensor in tensors.items():
            values_P, weight = tensor.detach().numpy(), update.weight if name == "delta" else 1.0
            own += self.vectors[name].add(values_P, weight, LIMIT - own)
            if not own < LIMIT:
                break
            added.append((self.vectors[name], values_P, weight))
        if not self.bound + own < LIMIT:
            for vector, values_P, weight in added:
                vector.take_out(values_P, weight)
            if not np.isfinite(own):
                raise NonFiniteUpdate(NOT_FINITE)
            if own >= LIMIT:
                raise NonFiniteUpdate(f"its update reaches {own:.3g}, beyond the exact sum's range of {LIMIT:.3g}")
        _check(self.bound + own)
        self.bound += own
        self.weight += round(update.weight * STEP)
        self.count += 1

    def part(self, first: int, size: int) -> PartialSum:
        """So many elements of each vector from the block that begins at `first`, as views, until something is added."""
        lengths = {name: len(vector.steps_P) for name, vector in self.vectors.items()}
        vectors = {name: vector.stretch(first, size) for name, vector in self.vectors.items()}
        return PartialSum(vectors, self.weight, self.count, self.bound, lengths)

    def close(self) -> PartialSum:
        """The sum of all that was added since the last close."""
        whole = self.part(0, max((len(vector.steps_P) for vector in self.vectors.values()), default=0))
        self._empty()
        return whole


def finite_bound(update: Update) -> float:
    """weight * max |delta| + the extras' own maxima; NonFiniteUpdate if a value or the weight is NaN or infinite."""
    extras = sum(_peak(extra.detach().numpy()) for extra in update.extras.values())
    bound = update.weight * _peak(update.delta.detach().numpy()) + extras
    if not np.isfinite([update.weight, bound]).all():
        raise NonFiniteUpdate(NOT_FINITE)
    return bound


def _peak(values: np.ndarray) -> float:
    """The largest |value|, NaN where there is any; without a copy."""
    return max(float(values.max()), -float(values.min())) if len(values) else 0.0


def _blocks(vector_P: np.ndarray) -> Iterator[np.ndarray]:
    return (vector_P[start : start + BLOCK] for start in range(0, len(vector_P), BLOCK))


def merge(partials: list[PartialSum]) -> Aggregate:
    """The sum over all slots as float32 vectors; ValueError when no client contributed or the grid's range is left."""
    found = merge_parts([[*partials]])
    if found is None:
        raise ValueError("no client of the cohort gave an update, so there is nothing to average")
    return found


def merge_parts(parts: Iterable[list[PartialSum]]) -> Aggregate | None:
    """As `merge`, of the slots' sums part after part; None when no client contributed.

    Each list is empty when the next one is asked for, so that the store can use the place of what was in it.
    """
    totals: dict[str, np.ndarray] = {}
    weight, count = 0, 0
    had: Counter[str] = Counter()
    for part in parts:
        weight, count = sum(partial.weight for partial in part), sum(partial.count for partial in part)
        _check(sum(partial.bound for partial in part))
        there = [partial for partial in part if partial.count]
        part.clear()
        for name, length in there[0].lengths.items() if there else ():
            if name not in totals:
                totals[name] = np.empty(length, np.float32)
            stretch = totals[name][had[name] :][: len(there[0].vectors[name])]
            for start in range(0, len(stretch), BLOCK):  # the wide integers stay in the cache
                block = slice(start, start + BLOCK)
                stretch[block] = sum(partial.vectors[name][block] for partial in there) / STEP
            had[name] += len(stretch)
        there.clear()
    if not count:
        return None
    vectors = {name: torch.from_numpy(total_P) for name, total_P in totals.items()}
    return Aggregate(weight / STEP, vectors.pop("delta"), vectors, count)


def cut(partial: PartialSum, partition: Partition, rank: int) -> PartialSum:
    """A rank's shard of a sum of whole vectors; what is not as long as delta each rank has whole, as gangs have it."""
    vectors = dict(partial.vectors)
    whole = sum(map(partition.length, range(len(partition.parts))))
    for name, vector in partial.vectors.items():
        if len(vector) == whole:
            vectors[name] = partition.cut(torch.from_numpy(vector), rank).numpy()
    return replace(partial, vectors=vectors, lengths={name: len(vector) for name, vector in vectors.items()})


def _check(bound: float) -> None:
    if bound >= LIMIT:
        raise ValueError(
            f"the sum of weight * |update| reaches {bound:.3g}, beyond the exact sum's range of {LIMIT:.3g}: "
            f"training diverged, or weights are far above 1"
        )
