"""Fixed point: clients' vectors as integers modulo 2^b whose sum cannot wrap. Legend: L coordinates, n clients.

Bonawitz et al. 2019 (arXiv 1912.00131) and Kairouz et al. 2021 (arXiv 2102.06387), section 4: clip, scale, round at
random, reduce. All sums of a session are one ring vector: a coordinate that is 1 for each client, the weight if a sum
needs one, then the sums one after another.
"""

import math
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Literal

import numpy as np

from strategies.core.errors import require
from strategies.secagg.masks import wrap

BLOCK = 16_384  # elements at a time: the float64 intermediate stays in the cache
DRAWS = 4  # float64 that one step of Philox's counter gives


@dataclass(frozen=True)
class Sum:
    """A sum that a strategy needs: `length` coordinates and how each is bounded.

    "weighted" and "plain" are numbers, clipped to +-bound; the first are multiplied by the client's weight. "noisy" is
    whole numbers that the caller has scaled and added noise to: never refused; the whole `bound` is that of their sum.
    """

    name: str
    length: int
    bound: float
    kind: Literal["weighted", "plain", "noisy"] = "plain"

    def __post_init__(self) -> None:
        proper = self.length >= 0 and 0 < self.bound < math.inf
        values = f"{self.bound}, {self.length}"
        require(proper, f"the sum {self.name!r} needs a bound above 0 and a length, not {values}")


@dataclass(frozen=True)
class Totals:
    """What the server learns: the number of clients, the sum of their weights (without any, their number), the sums."""

    count: int
    weight: float
    sums: dict[str, np.ndarray]


@dataclass(frozen=True)
class Sums:
    """The sums of a session with at most `clients` clients in the ring of integers modulo 2^bits.

    Weights, from 0 to 1, are rounded to steps of 1 / `weight_levels` before anything is multiplied, so that a mean is
    exact for the weights that the sum of weights holds; there are as many levels as the ring can add up.
    StrategyError where the ring is too small, saying what fits.
    """

    sums: tuple[Sum, ...]
    clients: int
    bits: int = 32

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 32, f"secure aggregation's ring has 2 to 32 bits, not {self.bits}")
        if len({entry.name for entry in self.sums}) != len(self.sums):
            raise ValueError("two sums have the same name")
        most = f"at most {self.half // 2} clients do; take more bits or a smaller cohort"
        require(self.peak >= 2, f"a cohort of {self.clients} does not fit a ring of {self.bits} bits: {most}")
        for entry in self.sums:
            reach = f"the sum {entry.name!r} reaches {int(entry.bound)}, and this ring ends at {self.half}"
            require(entry.kind != "noisy" or entry.bound <= self.half, reach)
            small = f"the bound of the sum {entry.name!r} is too small: {entry.bound}"
            require(math.isfinite(self.peak / entry.bound), small)

    @property
    def half(self) -> int:
        """The largest value of a sum: greater ring elements stand for negative values."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def peak(self) -> int:
        """Q: no coordinate of a client exceeds it, so that n of them stay in the ring."""
        return self.half // self.clients

    @property
    def weight_levels(self) -> int:
        """The number of steps of a weight; 0 if no sum is weighted. Weights have no sign and need no rounding."""
        weighted = any(entry.kind == "weighted" for entry in self.sums)
        return (int(2**self.bits) - 1) // self.clients if weighted else 0

    @property
    def starts(self) -> dict[str, int]:
        """The first coordinate of each sum."""
        ends = accumulate((entry.length for entry in self.sums), initial=2 if self.weight_levels else 1)
        return dict(zip((entry.name for entry in self.sums), ends, strict=False))

    @property
    def length(self) -> int:
        """L, all coordinates of the ring vector."""
        return sum(entry.length for entry in self.sums) + (2 if self.weight_levels else 1)

    @property
    def nbytes(self) -> int:
        """The size of a client's vector on the wire, at b bits a coordinate."""
        return -(-self.length * self.bits // 8)

    @property
    def digest(self) -> bytes:
        """A hash of everything here, which the session's identity covers."""
        facts = [f"{entry.name!r}/{entry.length}/{float(entry.bound)!r}/{entry.kind}" for entry in self.sums]
        facts += [f"{self.clients}/{self.bits}/{self.weight_levels}"]
        return sha256("\n".join(facts).encode()).digest()

    def scale(self, name: str) -> float:
        """s: the number of ring steps for 1 in this sum."""
        entry = self._entry(name)
        return (self.peak - 1) / entry.bound if entry.kind in ("weighted", "plain") else 1.0

    def level(self, weight: float) -> int:
        """A weight as a whole number of levels; StrategyError unless it is from 0 to 1."""
        require(0 <= weight <= 1, "a client's weight must be a number from 0 to 1")
        return round(weight * self.weight_levels)

    def encode_head(self, weight: float) -> np.ndarray:
        """The coordinates before the sums: 1, and the weight if a sum needs it."""
        return np.array([1, self.level(weight)] if self.weight_levels else [1], np.uint32)

    def encode_piece(
        self, name: str, values: np.ndarray, weight: float, rng: np.random.Generator, first: int = 0
    ) -> np.ndarray:
        """Coordinates `first` and on of one sum, as they are in the whole: a rank encodes its own shard alone.

        q = floor(clip(x) s + u), u uniform in [0, 1), which is unbiased and maps 0 to 0; |q| <= Q as |x| s <= Q - 1.
        `rng` is a Philox generator that nothing was drawn from; coordinate i takes its draw i, and it stays as it was.
        """
        entry = self._entry(name)
        encoded = np.empty(len(values), np.uint32)
        if entry.kind == "noisy":
            if not np.issubdtype(values.dtype, np.integer):
                raise ValueError(f"the sum {name!r} takes whole numbers")
            encoded[:] = values.astype(np.int64).astype(np.uint32)
            wrap(encoded, self.bits)
            return encoded
        factor = self.scale(name)
        if entry.kind == "weighted":
            factor *= self.level(weight) / self.weight_levels
        draws = _at(rng, self.starts[name] + first)
        for start in range(0, len(values), BLOCK):
            block = values[start : start + BLOCK].astype(np.float64)
            if not np.isfinite(block).all():
                raise ValueError(f"the sum {name!r} was given NaN or infinity")
            np.clip(block, -entry.bound, entry.bound, out=block)
            block *= factor
            block += draws.random(len(block))
            encoded[start : start + BLOCK] = np.floor(block, out=block).astype(np.int32).view(np.uint32)
        wrap(encoded, self.bits)
        return encoded

    def decode(self, total_L: np.ndarray) -> Totals:
        """The sums of what clients encoded, from the sum of their ring vectors."""
        pieces = {name: total_L[start : start + self._entry(name).length] for name, start in self.starts.items()}
        sums = {name: self.decode_piece(name, piece) for name, piece in pieces.items()}
        return Totals(*self.decode_head(total_L), sums)

    def decode_head(self, total_L: np.ndarray) -> tuple[int, float]:
        """The number of clients and the sum of their weights, from the coordinates before the sums."""
        count, levels = int(total_L[0]), self.weight_levels
        return count, int(total_L[1]) / levels if levels else float(count)

    def decode_piece(self, name: str, total: np.ndarray) -> np.ndarray:
        """Any coordinates of one sum: float64, or int64 for whole numbers."""
        shift = 32 - self.bits
        signed = (total << np.uint32(shift)).view(np.int32) >> np.int32(shift)  # the ring's sign bit moved to the top
        return signed.astype(np.int64) if self._entry(name).kind == "noisy" else signed / np.float64(self.scale(name))

    def _entry(self, name: str) -> Sum:
        return next(entry for entry in self.sums if entry.name == name)


def _at(rng: np.random.Generator, position: int) -> np.random.Generator:
    """A copy of the generator that goes on at its float64 number `position`."""
    state = rng.bit_generator.state["state"]
    philox = np.random.Philox(counter=state["counter"], key=state["key"]).advance(position // DRAWS)
    copy = np.random.Generator(philox)
    copy.random(position % DRAWS)
    return copy
