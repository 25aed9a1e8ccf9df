"""The random rotation that spreads a vector evenly over its coordinates. Legend: P parameters, D = 2^m >= P.

Ailon and Chazelle 2009's Hadamard transform with random signs, as in Kairouz et al. 2021 (arXiv 2102.06387):
after it no coordinate is much larger than norm / sqrt(D), so that a small ring holds the sum.
"""

import math

import numpy as np


def padded(length: int) -> int:
    """D: the next power of two."""
    return 1 << max(0, length - 1).bit_length()


def signs(rng: np.random.Generator, dimension: int) -> np.ndarray:
    """Random signs (D,) int8; the same for all clients of a round, and no secret."""
    return (2 * rng.integers(0, 2, dimension, np.int8) - 1).astype(np.int8)


def rotate(x_P: np.ndarray, signs_D: np.ndarray) -> np.ndarray:
    """H diag(signs) x / sqrt(D) in float64, x filled up with zeros."""
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
