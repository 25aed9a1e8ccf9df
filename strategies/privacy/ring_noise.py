"""The resolution of noisy sums in a ring of integers modulo 2^b. Legend: D coordinates after the rotation."""

import math
from dataclasses import dataclass

from strategies.privacy.integer_noise import LARGEST
from strategies.privacy.integers import padded

WRAP = 1e-6  # the probability, in a round, that rotation or noise makes a coordinate larger than planned


@dataclass(frozen=True)
class Ring:
    """At most `clients` clients, `scale` ring steps for 1, noise of `deviation` steps from each client.

    A coordinate of the sum stays within `signal` before the noise, except with a probability of WRAP. A deviation of 0
    means that the ring is too small.
    """

    clients: int
    bits: int
    dimension: int
    scale: float
    deviation: int
    signal: float

    @property
    def half(self) -> int:
        """The largest number that a sum may have: above are the negative ones."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def noise(self) -> float:
        """The standard deviation of the noise of all clients, in ring steps."""
        return math.sqrt(self.clients) * self.deviation

    @property
    def bound(self) -> int:
        """A coordinate of the noisy sum stays within it, except with `wrap_probability`; it fits the ring."""
        return math.ceil(self.signal + _widths(self.dimension) * self.noise)

    @property
    def wrap_probability(self) -> float:
        """A bound on the probability that any coordinate of a round wraps, with the noise taken as normal.

        A wrapped coordinate is wrong by the whole ring; the privacy is the same, since it needs no more than the
        noisy sum modulo 2^b.
        """
        beyond = (self.half - self.signal) / (self.noise * math.sqrt(2))
        return min(1.0, WRAP + self.dimension * math.erfc(beyond))


def fit(clients: int, honest: int, clip: float, noise_multiplier: float, length: int, bits: int) -> Ring:
    """The finest ring steps for z clip of noise from `honest` clients, where all `clients` add their part.

    After a random rotation a coordinate of the sum, of norm n clip at most, exceeds t with a probability of at most
    2 exp(-t^2 D / (2 n^2 clip^2)) (Hoeffding), for D of them; rounding adds less than 1 for each client. Signal and
    six deviations of the noise stay in the ring, or more where D is so large that six are exceeded.
    """
    dimension = padded(length)
    half = int(2 ** (bits - 1)) - 1
    spread = min(1.0, math.sqrt(2 * math.log(2 * dimension / WRAP) / dimension))
    widths = _widths(dimension)
    reach = clip * (clients * spread + widths * noise_multiplier * math.sqrt(clients / honest))
    # Rounded down to whole deviations, from which the scale follows: one exact sampler and no waste.
    finest = max(0.0, half - clients - 1) / reach
    deviation = min(LARGEST, math.floor(noise_multiplier * clip * finest / math.sqrt(honest)))
    scale = deviation * math.sqrt(honest) / (noise_multiplier * clip)
    return Ring(clients, bits, dimension, scale, deviation, scale * clip * clients * spread + clients)


def _widths(dimension: int) -> float:
    """The standard deviations that hold all coordinates of a normal vector, except with a probability of WRAP."""
    return max(6.0, math.sqrt(2 * math.log(2 * dimension / WRAP)))
