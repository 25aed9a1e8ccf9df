"""Rounding to whole numbers that keeps the norm in bounds (Kairouz et al. 2021, arXiv 2102.06387)."""

import math

import numpy as np

from strategies.privacy.noise_source import Words, uniform

LOG_BIAS = 0.5  # log(1 / beta): a rounding is refused with a probability of at most beta = e^-1/2, as in the paper


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

    The mean is right but for what the refusals change.
    """
    while True:
        up_D = y_D + uniform(words, len(y_D))
        q_D: np.ndarray = np.floor(up_D, out=up_D)
        if math.sqrt(float(q_D @ q_D)) <= bound:
            whole_D: np.ndarray = q_D.astype(np.int64)
            return whole_D
