"""Normal and gamma draws that have the same bits on any machine.

NumPy's generator gives the same integers and uniform numbers everywhere. The last bit of its other draws, and of its
logarithm and exponential, depends on the C library and the processor, and one bit may give a row to another client.
This module uses only sums, products, quotients and square roots, one array operation each: IEEE 754 fixes their bits.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# ln 2 in two parts, the first with zeros at its end: small multiples of it are exact.
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
LOG_SERIES = [1 / (2 * power + 1) for power in range(12)]
EXP_SERIES = [1 / math.factorial(power) for power in range(15)]
# Draws in one block, so that the many small operations stay in the cache.
BLOCK = 1 << 15


def log(x: Floats) -> Floats:
    """The natural logarithm of positive numbers, to about the last bit."""
    fraction, exponent = np.frexp(x)
    low = fraction < math.sqrt(0.5)
    fraction = np.where(low, 2 * fraction, fraction)
    exponents = (exponent - low).astype(np.float64)
    ratio = (fraction - 1) / (fraction + 1)
    logs: Floats = 2 * ratio * _polynomial(LOG_SERIES, ratio * ratio) + exponents * LN2_LOW
    return logs + exponents * LN2_HIGH


def exp(x: Floats) -> Floats:
    """The exponential of numbers below 700, to about the last bit; 0 where it is too small for a float."""
    x = np.maximum(x, -800.0)
    power = np.rint(x * (1 / math.log(2)))
    rest = (x - power * LN2_HIGH) - power * LN2_LOW
    powers: Floats = np.ldexp(_polynomial(EXP_SERIES, rest), power.astype(np.int32))
    return powers


def normal(rng: np.random.Generator, size: int) -> Floats:
    """Standard normal draws: Marsaglia's polar method."""
    draws = np.empty(size)
    filled = 0
    while filled < size:
        wanted = (min(size - filled, BLOCK) + 1) // 2
        x, y = 2 * rng.random((2, wanted + wanted // 3 + 8)) - 1
        square = x * x + y * y
        inside = (square > 0) & (square < 1)
        x, y, square = x[inside][:wanted], y[inside][:wanted], square[inside][:wanted]
        factor = np.sqrt(-2 * log(square) / square)
        some = np.concatenate([x * factor, y * factor])[: size - filled]
        draws[filled : filled + len(some)] = some
        filled += len(some)
    return draws


def log_gamma(rng: np.random.Generator, alpha: float | Sequence[float], size: int) -> Floats:
    """Logarithms of draws from Gamma(alpha, 1), since the draws themselves underflow to 0 for a small alpha.

    Several alphas are used in turn. Draws from Gamma(alpha + 1, 1) by Marsaglia and Tsang (2000), times U^(1 / alpha),
    which makes them Gamma(alpha, 1).
    """
    draws = np.empty(size)
    alphas = np.resize(np.array(alpha, dtype=np.float64), size)
    for first in range(0, size, BLOCK):
        some = alphas[first : first + BLOCK]
        draws[first : first + BLOCK] = _log_gamma_above_one(rng, some + 1) + log(1 - rng.random(len(some))) / some
    return draws


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


def _polynomial(coefficients: list[float], x: Floats) -> Floats:
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total *= x
        total += coefficient
    return total
