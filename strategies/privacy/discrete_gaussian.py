"""The distributed discrete Gaussian: each client adds whole normal numbers (Kairouz et al. 2021, arXiv 2102.06387)."""

import math
from dataclasses import dataclass

import numpy as np

from strategies.privacy.noise_source import Words, below, coin_exp

LARGEST = 2**24  # of the standard deviation: nothing below leaves int64


@dataclass(frozen=True)
class DiscreteGaussianSum:
    """The sum of `clients` independent discrete Gaussians in each of `dimension` coordinates.

    `deviation` is each client's, `norm` the largest L2 norm of one client's integers.
    """

    clients: int
    deviation: int
    norm: float
    dimension: int

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        """a e^2 / 2 with e = min(sqrt(D^2 / (n s^2) + t d / 2), D / (sqrt(n) s) + t sqrt(d)), theorem 1.

        t = 10 sum_{k=1..n-1} exp(-2 pi^2 s^2 k / (k + 1)): a sum of discrete Gaussians is nearly one, but not quite.
        """
        k = np.arange(1, self.clients)
        gap = 10 * float(np.exp(-2 * math.pi**2 * self.deviation**2 * k / (k + 1)).sum())
        share = self.norm / (math.sqrt(self.clients) * self.deviation)
        distance = min(math.sqrt(share**2 + gap * self.dimension / 2), share + gap * math.sqrt(self.dimension))
        rdp: np.ndarray = orders * distance**2 / 2
        return rdp


def discrete_gaussian(words: Words, count: int, deviation: int) -> np.ndarray:
    """Whole numbers (N,) int64 with probabilities in proportion to exp(-x^2 / (2 s^2)); exact.

    Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), algorithm 3, with whole s and the Laplace scale s: a discrete
    Laplace number y is kept with probability exp(-(|y| - s)^2 / (2 s^2)).
    """
    assert 1 <= deviation <= LARGEST
    found = np.empty(count, np.int64)
    have = 0
    while have < count:
        drawn = _discrete_laplace(words, 2 * (count - have) + 16, deviation)
        drawn = drawn[coin_exp(words, (np.abs(drawn) - deviation) ** 2, 2 * deviation**2)][: count - have]
        found[have : have + len(drawn)] = drawn
        have += len(drawn)
    return found


def _discrete_laplace(words: Words, tries: int, scale: int) -> np.ndarray:
    """Numbers with probabilities in proportion to exp(-|y| / scale): what of so many tries is kept (algorithm 2)."""
    rest = below(words, tries, scale)
    rest = rest[coin_exp(words, rest, scale)]
    wholes = np.zeros(len(rest), np.int64)
    index = np.arange(len(rest))
    while len(index):
        index = index[coin_exp(words, np.ones(len(index), np.int64), 1)]
        wholes[index] += 1
    sizes = rest + scale * wholes
    negative = below(words, len(sizes), 2) == 1
    kept = ~(negative & (sizes == 0))  # or 0 would come twice as often
    signed: np.ndarray = np.where(negative, -sizes, sizes)[kept]
    return signed
