"""A vector as whole numbers of bounded norm, and back: a random rotation, then rounding at random.

Both as in Kairouz et al. 2021 (arXiv 2102.06387). The rotation is Ailon and Chazelle's Hadamard transform with random
signs (2009): after it no coordinate is much larger than norm / sqrt(D), so that a small ring holds the sum.
Legend: P parameters, D = 2^m >= P.
"""

import math

import numpy as np

from strategies.privacy.noise_source import Words, uniform

LOG_BIAS = 0.5  # log(1 / beta): a rounding is refused with a probability of at most beta = e^-1/2, as in the paper


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
    """The largest L2 norm after rounding, for a norm of so many ring steps before.

    min(norm + sqrt(D), sqrt(norm^2 + D / 4 + sqrt(2 log(1 / beta)) (norm + sqrt(D) / 2))), theorem 1.
    """
    root = math.sqrt(dimension)
    return min(norm + root, math.sqrt(norm**2 + dimension / 4 + math.sqrt(2 * LOG_BIAS) * (norm + root / 2)))


def largest_l1(norm: float, dimension: int) -> float:
    """The largest L1 norm of whole numbers with this L2 norm: |x| <= x^2 for each of them."""
    return min(math.sqrt(dimension) * norm, norm**2)


def rounded(y_D: np.ndarray, bound: float, words: Words) -> np.ndarray:
    """Whole numbers (D,) int64, each up or down at random with the right mean, again until |q| <= bound.

    The refusals change the mean a little.
    """
    while True:
        up_D = y_D + uniform(words, len(y_D))
        q_D: np.ndarray = np.floor(up_D, out=up_D)
        if math.sqrt(float(q_D @ q_D)) <= bound:
            whole_D: np.ndarray = q_D.astype(np.int64)
            return whole_D
