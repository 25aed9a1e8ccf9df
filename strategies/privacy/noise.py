"""Noise from uniform words: exact coin flips, normal numbers, and whole numbers whose sum several clients add.

The caller decides where the words come from: a generator of `seeds`, or the operating system where noise is secret.

Skellam: Agarwal et al. 2021, "The Skellam Mechanism for Differentially Private Federated Learning", arXiv 2110.04995.
Each client adds the difference of two Poisson numbers; sums of them are Skellam again, so that the surviving clients
add exactly their share. Discrete Gaussian: Kairouz et al. 2021, arXiv 2102.06387.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from strategies.privacy.accounting import RingNoise

Words = Callable[[int], np.ndarray]  # N -> N uniform words, (N,) uint64


def seeded_words(rng: np.random.Generator) -> Words:
    """The words of a generator."""
    return lambda count: rng.integers(0, 2**64, count, np.uint64)


def byte_words(read: Callable[[int], bytes]) -> Words:
    """Words of bytes such as those of `os.urandom`."""
    return lambda count: np.frombuffer(read(8 * count), np.uint64)


def uniform(words: Words, count: int) -> np.ndarray:
    """Numbers in (0, 1), never 0 or 1: the middles of 2^52 parts, each of which float64 holds exactly."""
    return ((words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def below(words: Words, count: int, bound: int) -> np.ndarray:
    """Whole numbers of 0 to bound - 1 (N,) int64, exactly uniform: the last words are drawn again."""
    assert 1 <= bound <= 2**50  # so that nearly every word can be used
    last = np.uint64(2**64 // bound * bound - 1)
    drawn = words(count)
    high = np.flatnonzero(drawn > last)
    if len(high):
        drawn = drawn.copy()
        while len(high):
            drawn[high] = words(len(high))
            high = high[drawn[high] > last]
    return (drawn % np.uint64(bound)).astype(np.int64)


def coin_exp(words: Words, above_N: np.ndarray, under: int) -> np.ndarray:
    """True with probability exp(-above / under), each; exact (Canonne et al. 2020, arXiv 2004.00010, algorithm 1)."""
    ones_N, rest_N = np.divmod(above_N, under)
    coins_N = _coin_exp_below_one(words, rest_N, under)
    index = np.flatnonzero(coins_N & (ones_N > 0))
    flips = 0
    while len(index):  # exp(-k) is k coins of exp(-1)
        flips += 1
        heads = _coin_exp_below_one(words, np.ones(len(index), np.int64), 1)
        coins_N[index[~heads]] = False
        index = index[heads & (ones_N[index] > flips)]
    return coins_N


def _coin_exp_below_one(words: Words, above_N: np.ndarray, under: int) -> np.ndarray:
    """Coins of above / (under k) for k = 1, 2, ... until one fails: the series of exp, if the failing k is odd."""
    odd = np.zeros(len(above_N), bool)
    index = np.arange(len(above_N))
    k = 0
    while len(index):
        k += 1
        heads = below(words, len(index), under) < above_N[index]
        if k > 1:
            heads &= below(words, len(index), k) == 0
        odd[index[~heads]] = k % 2 == 1
        index = index[heads]
    return odd


def normal(words: Words, count: int) -> np.ndarray:
    """Standard normal numbers (N,) float64 (Box and Muller 1958), up to 8.6 in size.

    They are not safe from an adversary who reads the last bits of the noisy sum (Mironov 2012, "On Significance of the
    Least Significant Bits for Differential Privacy"); noise of whole numbers is.
    """
    half = -(-count // 2)
    radius_H = np.sqrt(-2 * np.log(uniform(words, half)))
    angle_H = 2 * np.pi * uniform(words, half)
    return np.concatenate([radius_H * np.cos(angle_H), radius_H * np.sin(angle_H)])[:count]


LARGEST = 2**24  # of the standard deviation: nothing below leaves int64
SMALL = 10.0  # means below are drawn by inversion
SERIES = 16  # Stirling's series is exact to the last digits from here on


@dataclass(frozen=True)
class SkellamSum(RingNoise):
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
    return _filled(count, lambda missing: _by_rejection(words, missing * 5 // 4 + 16, mean))


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
    floor = math.floor(mean)  # apart: a large mean would take the digits that decide between neighbors
    never_N = (s_N < 0.013) & (v_N > s_N)
    off_N = np.where(never_N, 0.0, np.floor((2 * a / s_N + b) * u_N + (mean - floor) + 0.43))
    k_N: np.ndarray = off_N.astype(np.int64) + floor
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
        log_N = -deviance_N - series_N - 0.5 * np.log(2 * np.pi * x_N)
    for k in range(SERIES):
        log_N[k_N == k] = k * math.log(mean) - mean - math.lgamma(k + 1)
    return log_N


@dataclass(frozen=True)
class DiscreteGaussianSum(RingNoise):
    """The sum of `clients` discrete Gaussians in each coordinate; `norm` is the largest of one client's integers."""

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

    def draw(missing: int) -> np.ndarray:
        drawn = _discrete_laplace(words, 2 * missing + 16, deviation)
        kept: np.ndarray = drawn[coin_exp(words, (np.abs(drawn) - deviation) ** 2, 2 * deviation**2)]
        return kept

    return _filled(count, draw)


def _discrete_laplace(words: Words, tries: int, scale: int) -> np.ndarray:
    """Numbers with probabilities in proportion to exp(-|y| / scale): the accepted of `tries` (algorithm 2)."""
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


def _filled(count: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """`count` numbers (N,) int64 from a sampler that is asked for the missing ones and gives more or fewer."""
    draws, missing = [np.empty(0, np.int64)], count
    while missing > 0:
        draws.append(draw(missing)[:missing])
        missing -= len(draws[-1])
    return np.concatenate(draws)
