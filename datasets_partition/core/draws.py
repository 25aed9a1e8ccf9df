"""Normal and gamma draws that have the same bits on any machine.

NumPy's generator gives the same integers and uniform numbers everywhere. The last bit of its other draws, and of its
logarithm and exponential, depends on the C library and the processor, and one bit may give a row to another client.
This module uses only sums, products, quotients and square roots, one array operation each: IEEE 754 fixes their bits.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.polynomial.polynomial import polyval
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# ln 2 in two parts, the first with zeros at its end: small multiples of it are exact.
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
LOG_SERIES = [1 / (2 * power + 1) for power in range(12)]
EXP_SERIES = [1 / math.factorial(power) for power in range(15)]
BLOCK = 1 << 15  # draws in one block, so that the many small operations stay in the cache


def log(x: Floats) -> Floats:
    """The natural logarithm of positive numbers, to about the last bit."""
    fraction, exponent = np.frexp(x)
    low = fraction < math.sqrt(0.5)
    fraction = np.where(low, 2 * fraction, fraction)
    exponents = (exponent - low).astype(np.float64)
    ratio = (fraction - 1) / (fraction + 1)
    logs: Floats = 2 * ratio * polyval(ratio * ratio, LOG_SERIES) + exponents * LN2_LOW + exponents * LN2_HIGH
    return logs


def exp(x: Floats) -> Floats:
    """The exponential of numbers below 700, to about the last bit; 0 where it is too small for a float."""
    x = np.maximum(x, -800.0)
    power = np.rint(x * (1 / math.log(2)))
    rest = (x - power * LN2_HIGH) - power * LN2_LOW
    powers: Floats = np.ldexp(polyval(rest, EXP_SERIES), power.astype(np.int32))
    return powers


def normal(rng: np.random.Generator, size: int) -> Floats:
    """Standard normal draws: Marsaglia's polar method."""
    draws = np.empty(0)
    while len(draws) < size:
        wanted = (min(size - len(draws), BLOCK) + 1) // 2
        x, y = 2 * rng.random((2, wanted + wanted // 3 + 8)) - 1
        square = x * x + y * y
        inside = (square > 0) & (square < 1)
        x, y, square = x[inside][:wanted], y[inside][:wanted], square[inside][:wanted]
        factor = np.sqrt(-2 * log(square) / square)
        draws = np.concatenate([draws, x * factor, y * factor])[:size]
    return draws


def log_gamma(rng: np.random.Generator, alpha: float | Sequence[float], size: int) -> Floats:
    """Logarithms of draws from Gamma(alpha, 1), since the draws themselves underflow to 0 for a small alpha.

    Several alphas are used in turn. Draws from Gamma(alpha + 1, 1) (Marsaglia and Tsang 2000), times U^(1 / alpha).
    """
    blocks = np.split(np.resize(np.array(alpha, dtype=np.float64), size), range(BLOCK, size, BLOCK))
    draws = [_log_gamma_above_one(rng, some + 1) + log(1 - rng.random(len(some))) / some for some in blocks]
    return np.concatenate(draws)


def _log_gamma_above_one(rng: np.random.Generator, alphas: Floats) -> Floats:
    least = alphas - 1 / 3
    draws = np.empty(len(alphas))
    missing = np.arange(len(alphas))
    while len(missing):
        x, d = normal(rng, len(missing)), least[missing]
        v = 1 + x / np.sqrt(9 * d)
        possible = v > 0
        cube = np.where(possible, v * v * v, 1.0)
        logs = log(cube)
        accepted = possible & (log(1 - rng.random(len(missing))) < 0.5 * x * x + d - d * cube + d * logs)
        draws[missing[accepted]] = logs[accepted]
        missing = missing[~accepted]
    return draws + log(least)
