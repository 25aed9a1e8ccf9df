"""A vector as whole numbers of bounded norm in a ring modulo 2^b, and back: a random rotation, rounding at random.

Both as in Kairouz et al. 2021 (arXiv 2102.06387). The rotation is Ailon and Chazelle's Hadamard transform with random
signs (2009): after it no coordinate is much larger than norm / sqrt(D), so that a small ring holds the sum.
Legend: P parameters, D = 2^m >= P.
"""

import math
from dataclasses import dataclass

import numpy as np

from strategies.privacy.noise import LARGEST, Words, uniform

LOG_BIAS = 0.5  # log(1 / beta): a rounding is refused with a probability of at most beta = e^-1/2, as in the paper
WRAP = 1e-6  # the probability, in a round, that rotation or noise makes a coordinate larger than planned


def padded(length: int) -> int:
    """D: the next power of two."""
    return 1 << max(0, length - 1).bit_length()


def signs(rng: np.random.Generator, dimension: int) -> np.ndarray:
    """Random signs (D,) int8; the same for all clients of a round, and no secret."""
    return (2 * rng.integers(0, 2, dimension, np.int8) - 1).astype(np.int8)


def rotate(x_P: np.ndarray, signs_D: np.ndarray) -> np.ndarray:
    """H diag(signs) x / sqrt(D) in float64, x padded with zeros."""
    y_D = np.zeros(len(signs_D))
    y_D[: len(x_P)] = x_P
    y_D *= signs_D
    return _hadamard(y_D)


def rotate_back(y_D: np.ndarray, signs_D: np.ndarray, length: int) -> np.ndarray:
    """x of length P from y; the transform is its own inverse."""
    x_D: np.ndarray = _hadamard(y_D.astype(np.float64)) * signs_D
    return x_D[:length]


def _hadamard(y_D: np.ndarray) -> np.ndarray:
    """The orthonormal Walsh-Hadamard transform, in place."""
    half = 1
    while half < len(y_D):
        pairs = y_D.reshape(-1, 2, half)
        plus = pairs[:, 0] + pairs[:, 1]
        np.subtract(pairs[:, 0], pairs[:, 1], out=pairs[:, 1])
        pairs[:, 0] = plus
        half *= 2
    y_D /= math.sqrt(len(y_D))
    return y_D


def inflated(norm: float, dimension: int) -> float:
    """The largest L2 norm after rounding, for a norm before it, in steps of the ring.

    min(norm + sqrt(D), sqrt(norm^2 + D / 4 + sqrt(2 log(1 / beta)) (norm + sqrt(D) / 2))), theorem 1.
    """
    root = math.sqrt(dimension)
    return min(norm + root, math.sqrt(norm**2 + dimension / 4 + math.sqrt(2 * LOG_BIAS) * (norm + root / 2)))


def largest_l1(norm: float, dimension: int) -> float:
    """The largest L1 norm of whole numbers with this L2 norm: |x| <= x^2 for each of them."""
    return min(math.sqrt(dimension) * norm, norm**2)


def rounded(y_D: np.ndarray, bound: float, words: Words) -> np.ndarray:
    """Whole numbers (D,) int64, rounded at random with the right mean, until |q| <= bound, which shifts it a little."""
    while True:
        up_D = y_D + uniform(words, len(y_D))
        q_D: np.ndarray = np.floor(up_D, out=up_D)
        if math.sqrt(float(q_D @ q_D)) <= bound:
            whole_D: np.ndarray = q_D.astype(np.int64)
            return whole_D


@dataclass(frozen=True)
class Ring:
    """At most `clients` clients, `scale` ring steps for 1, noise of `deviation` steps from each client.

    Before the noise a coordinate of the sum exceeds `signal` with probability WRAP. Deviation 0: the ring is too small.
    """

    clients: int
    bits: int
    dimension: int
    scale: float
    deviation: int
    signal: float

    @property
    def bound(self) -> int:
        """What a coordinate of the noisy sum stays within, except with a small probability; it fits the ring.

        A coordinate that wraps is wrong by the whole ring, and as private: privacy needs the sum modulo 2^b alone.
        """
        return math.ceil(self.signal + _widths(self.dimension) * math.sqrt(self.clients) * self.deviation)


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
