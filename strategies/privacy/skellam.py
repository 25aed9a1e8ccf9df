"""The Skellam mechanism: each client adds the difference of two Poisson numbers.

Agarwal et al. 2021, "The Skellam Mechanism for Differentially Private Federated Learning", arXiv 2110.04995. Sums of
Skellam numbers are Skellam again, so that the clients that survive add exactly their share.
"""

import math
from dataclasses import dataclass

import numpy as np

from strategies.privacy.noise_source import Words, uniform

SMALL = 10.0  # means below are drawn by inversion
SERIES = 16  # Stirling's series is exact to the last digits from here on


@dataclass(frozen=True)
class SkellamSum:
    """Skellam noise of this variance in each coordinate, and the largest norms of one client's integers."""

    variance: float
    norm: float
    norm_l1: float

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        """a D2^2 / (2 m) + min(((2a - 1) D2^2 + 6 D1) / (4 m^2), 3 D1 / (2 m)), m the variance (section 3)."""
        m, square = self.variance, self.norm**2
        tail = ((2 * orders - 1) * square + 6 * self.norm_l1) / (4 * m**2)
        rdp: np.ndarray = orders * square / (2 * m) + np.minimum(tail, 3 * self.norm_l1 / (2 * m))
        return rdp


def skellam(words: Words, count: int, variance: float) -> np.ndarray:
    """Whole numbers (N,) int64 of mean 0: the difference of two Poisson numbers of half the variance."""
    drawn: np.ndarray = poisson(words, count, variance / 2) - poisson(words, count, variance / 2)
    return drawn


def poisson(words: Words, count: int, mean: float) -> np.ndarray:
    """Poisson numbers (N,) int64; as exact as float64.

    Large means by the transformed rejection PTRS of Hörmann 1993 ("The transformed rejection method for generating
    Poisson random variables"), with a log-probability that does not cancel.
    """
    if mean < SMALL:
        return _by_inversion(words, count, mean)
    found = np.empty(count, np.int64)
    have = 0
    while have < count:
        drawn = _by_rejection(words, (count - have) * 5 // 4 + 16, mean)[: count - have]
        found[have : have + len(drawn)] = drawn
        have += len(drawn)
    return found


def _by_inversion(words: Words, count: int, mean: float) -> np.ndarray:
    drawn = uniform(words, count)
    edges, probability, k = [], math.exp(-mean), 0
    total = probability
    while probability > 1e-18 or k < mean:
        edges.append(total)
        k += 1
        probability *= mean / k
        total += probability
    return np.searchsorted(np.array(edges), drawn, side="right").astype(np.int64)


def _by_rejection(words: Words, tries: int, mean: float) -> np.ndarray:
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    log_area = math.log(1.1239 + 1.1328 / (b - 3.4))
    inner = 0.9277 - 3.6224 / (b - 2)
    u_N, v_N = uniform(words, tries) - 0.5, uniform(words, tries)
    s_N = 0.5 - np.abs(u_N)
    whole = math.floor(mean)  # apart: a large mean would take the digits that decide between neighbours
    never_N = (s_N < 0.013) & (v_N > s_N)
    off_N = np.where(never_N, 0.0, np.floor((2 * a / s_N + b) * u_N + (mean - whole) + 0.43))
    k_N: np.ndarray = off_N.astype(np.int64) + whole
    sure_N = (s_N >= 0.07) & (v_N <= inner)
    fits_N = np.log(v_N) + log_area - np.log(a / s_N**2 + b) <= log_poisson(k_N, mean)
    kept: np.ndarray = k_N[(k_N >= 0) & ~never_N & (sure_N | fits_N)]
    return kept


def log_poisson(k_N: np.ndarray, mean: float) -> np.ndarray:
    """Log-probabilities as in Loader 2000, "Fast and Accurate Computation of Binomial Probabilities"."""
    k_N = np.maximum(k_N, 0)
    x_N = k_N.astype(np.float64)
    off_N = (x_N - mean) / mean
    with np.errstate(divide="ignore", invalid="ignore"):
        deviance_N = mean * ((1 + off_N) * np.log1p(off_N) - off_N)
        inverse_N = 1 / x_N
        series_N = inverse_N * (1 / 12 - inverse_N**2 * (1 / 360 - inverse_N**2 * (1 / 1260 - inverse_N**2 / 1680)))
        found = -deviance_N - series_N - 0.5 * np.log(2 * np.pi * x_N)
    for k in range(SERIES):
        found[k_N == k] = k * math.log(mean) - mean - math.lgamma(k + 1)
    return found
