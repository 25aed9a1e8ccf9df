"""The source of noise: uniform words that the caller provides, and exact coin flips made of them.

The caller decides where the words come from: in a simulation from a generator of `seeds`; where noise must be secret,
from the operating system's bytes.
"""

from collections.abc import Callable

import numpy as np

Words = Callable[[int], np.ndarray]  # gives so many uniform words, (N,) uint64

LARGEST = 2**50  # of the ranges to draw from: nearly every word can be used


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
    assert 1 <= bound <= LARGEST
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
    """True with probability exp(-above / under), each; exact, from whole numbers alone.

    Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), algorithm 1.
    """
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
