"""The exact sum: weighted updates on a fixed grid of int64, the same bits in any order. Legend: P parameters.

A value x with weight w is rounded to the grid step 2^-40; integers add without rounding. Ranges are checked before the
cast, where NaN and overflow would all become the smallest integer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from engine.messages.errors import RunError
from strategies.core.protocol import Aggregate, Update
from strategies.core.sharding import Partition

STEP = 2.0**40
LIMIT = 2.0**22  # of sum w |x|: half of int64's room, so that no merge of checked partial sums can wrap
BLOCK = 65_536  # elements at a time: what is made of them stays in the cache
# From 2^52 on doubles are 1 apart: adding this constant to a number rounds it and puts the integer into the last bits.
NEAREST = 1.5 * 2.0**52
NEAREST_BITS = np.float64(NEAREST).view(np.int64)  # its own bits, which are taken out of a sum when it closes
ROOM = 2.0**51 / STEP  # values must stay below it for this kind of rounding

NOT_FINITE = "its update holds NaN or infinity"


class NonFiniteUpdate(ValueError):
    """An update cannot be used: it holds NaN or infinity, or leaves the range of its sum."""


@dataclass(frozen=True)
class PartialSum:
    """A slot's share of a round: sums on the grid (int64), the sum of weights on the grid, and the number of clients.

    `bound` is the sum of weight * max |x|, which is checked for overflow. `vectors` may be a section of `lengths`.
    """

    vectors: dict[str, np.ndarray]
    weight: int
    count: int
    bound: float
    lengths: dict[str, int]

    @property
    def nbytes(self) -> int:
        """The bytes of its vectors in the object store."""
        return sum(vector.nbytes for vector in self.vectors.values())


class OnGrid:
    """One vector's running sum in steps of the grid (P,), processed in blocks."""

    def __init__(self, length: int) -> None:
        self.steps_P = np.zeros(length, np.int64)
        self.nearest = [0] * -(-length // BLOCK)  # how often NEAREST_BITS are in each block
        self.scratch_B = np.empty(min(BLOCK, length))

    def add(self, values_P: np.ndarray, weight: float, limit: float) -> float:
        """Adds weight * values (P,), and nothing if |weight * value| reaches `limit`; returns the largest."""
        largest = 0.0  # in the same pass: reading a large vector takes longer than the arithmetic
        for block, values_B in enumerate(_blocks(values_P)):
            reached = weight * _peak(values_B)
            if not reached < limit:  # NaN is not
                self.take_out(values_P[: block * BLOCK], weight)
                return reached
            self._put(np.add, block, values_B, weight, reached)
            largest = max(largest, reached)
        return largest

    def take_out(self, values_P: np.ndarray, weight: float) -> None:
        """Undoes an addition, bit for bit."""
        for block, values_B in enumerate(_blocks(values_P)):
            self._put(np.subtract, block, values_B, weight, weight * _peak(values_B))

    def _put(self, put: np.ufunc, block: int, values_B: np.ndarray, weight: float, reached: float) -> None:
        """Rounds to the nearest step, ties to even."""
        sum_B, steps_B = self.steps_P[block * BLOCK :][: len(values_B)], self.scratch_B[: len(values_B)]
        steps_B[:] = values_B
        steps_B *= weight * STEP
        if reached < ROOM:  # faster than a conversion to integers
            steps_B += NEAREST
            self.nearest[block] += 1 if put is np.add else -1
            put(sum_B, steps_B.view(np.int64), out=sum_B)
        else:
            put(sum_B, np.rint(steps_B).astype(np.int64), out=sum_B)

    def stretch(self, first: int, size: int) -> np.ndarray:
        """Returns `size` elements from the block that begins at `first`: a view, valid until something is added."""
        stretch = self.steps_P[first : first + size]
        for block, sum_B in enumerate(_blocks(stretch), first // BLOCK):
            # Integers wrap around, so this is right for any number of additions.
            sum_B -= np.uint64(self.nearest[block] * int(NEAREST_BITS) % 2**64).view(np.int64)
            self.nearest[block] = 0
        return stretch


@dataclass
class ExactSum:
    """Adds clients' updates in place; `section` shows the sum, `take` hands it over and begins again at zero."""

    vectors: dict[str, OnGrid] = field(default_factory=dict)
    weight: int = 0
    count: int = 0
    bound: float = 0.0

    def add(self, update: Update) -> None:
        """Adds weight * delta and the unweighted extras; on NonFiniteUpdate, or RunError for all, nothing changes."""
        assert "delta" not in update.extras and update.delta.ndim == 1
        if not np.isfinite(update.weight):
            raise NonFiniteUpdate(NOT_FINITE)
        tensors = {"delta": update.delta, **update.extras}
        for name, tensor in tensors.items():
            if name not in self.vectors:
                self.vectors[name] = OnGrid(tensor.numel())
            if (length := len(self.vectors[name].steps_P)) != tensor.numel():
                given = f"{name!r} has {tensor.numel()} values for client {update.client}, and {length} for others"
                raise ValueError(f"{given}: what a strategy adds up must be of one length")
        bound, added = 0.0, list[tuple[OnGrid, np.ndarray, float]]()
        for name, tensor in tensors.items():
            values_P, weight = tensor.detach().numpy(), update.weight if name == "delta" else 1.0
            bound += self.vectors[name].add(values_P, weight, LIMIT - bound)
            if not bound < LIMIT:
                break
            added.append((self.vectors[name], values_P, weight))
        if not self.bound + bound < LIMIT:
            for vector, values_P, weight in added:
                vector.take_out(values_P, weight)
            if not bound < LIMIT:
                reaches = f"its update reaches {bound:.3g}, beyond the exact sum's range of {LIMIT:.3g}"
                raise NonFiniteUpdate(reaches if np.isfinite(bound) else NOT_FINITE)
        _check(self.bound + bound)
        self.bound += bound
        self.weight += round(update.weight * STEP)
        self.count += 1

    def section(self, first: int, size: int) -> PartialSum:
        """Returns `size` elements of each vector from the block at `first` on: views, until something is added."""
        lengths = {name: len(vector.steps_P) for name, vector in self.vectors.items()}
        vectors = {name: vector.stretch(first, size) for name, vector in self.vectors.items()}
        return PartialSum(vectors, self.weight, self.count, self.bound, lengths)

    def take(self) -> PartialSum:
        """Returns the sum of all that was added since the last time, and forgets it."""
        partial = self.section(0, max((len(vector.steps_P) for vector in self.vectors.values()), default=0))
        self.vectors, self.weight, self.count, self.bound = {}, 0, 0, 0.0
        return partial


def finite_bound(update: Update) -> float:
    """Returns weight * max |delta| + each extra's maximum; NonFiniteUpdate if a value or the weight is not finite."""
    extras = sum(_peak(extra.detach().numpy()) for extra in update.extras.values())
    bound = update.weight * _peak(update.delta.detach().numpy()) + extras
    if not np.isfinite([update.weight, bound]).all():
        raise NonFiniteUpdate(NOT_FINITE)
    return bound


def _peak(values: np.ndarray) -> float:
    """Returns the largest |value|, NaN if there is any, without a copy."""
    return max(float(values.max()), -float(values.min())) if len(values) else 0.0


def _blocks(vector_P: np.ndarray) -> Iterator[np.ndarray]:
    return (vector_P[start : start + BLOCK] for start in range(0, len(vector_P), BLOCK))


def merge(partials: list[PartialSum]) -> Aggregate:
    """Returns the sum over all slots as float32 vectors; RunError if no client contributed or the range is exceeded."""
    if (aggregate := merge_sections([[*partials]])) is None:
        raise RunError("no client of the cohort gave an update, so there is nothing to average")
    return aggregate


def merge_sections(sections: Iterable[list[PartialSum]]) -> Aggregate | None:
    """As `merge`, from the slots' sums section by section; None if no client contributed."""
    totals: dict[str, np.ndarray] = {}
    weight, count = 0, 0
    filled: Counter[str] = Counter()
    for section in sections:
        weight, count = sum(partial.weight for partial in section), sum(partial.count for partial in section)
        _check(sum(partial.bound for partial in section))
        contributing = [partial for partial in section if partial.count]
        section.clear()  # so that the store can free it before the next section comes
        for name, length in contributing[0].lengths.items() if contributing else ():
            if name not in totals:
                totals[name] = np.empty(length, np.float32)
            stretch = totals[name][filled[name] :][: len(contributing[0].vectors[name])]
            for start in range(0, len(stretch), BLOCK):  # the wide integers stay in the cache
                block = slice(start, start + BLOCK)
                stretch[block] = sum(partial.vectors[name][block] for partial in contributing) / STEP
            filled[name] += len(stretch)
        contributing.clear()
    if not count:
        return None
    vectors = {name: torch.from_numpy(total_P) for name, total_P in totals.items()}
    return Aggregate(weight / STEP, vectors.pop("delta"), vectors, count)


def cut(partial: PartialSum, partition: Partition, rank: int) -> PartialSum:
    """Returns a rank's shard of a sum of whole vectors; vectors not as long as delta are whole in each rank."""
    delta_length = len(partial.vectors["delta"]) if partial.count else 0  # without clients there are no vectors
    vectors = {
        name: partition.cut(torch.from_numpy(vector), rank).numpy() if len(vector) == delta_length else vector
        for name, vector in partial.vectors.items()
    }
    return replace(partial, vectors=vectors, lengths={name: len(vector) for name, vector in vectors.items()})


def _check(bound: float) -> None:
    if bound >= LIMIT:
        raise RunError(
            f"the sum of weight * |update| reaches {bound:.3g}, beyond the exact sum's range of {LIMIT:.3g}: "
            f"training diverged, or weights are far above 1"
        )
