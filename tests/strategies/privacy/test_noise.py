"""The samplers against their probabilities, from fixed seeds and from bytes."""

import math
import os

import numpy as np
import pytest
from scipy import stats

from strategies.core.seeds import rng
from strategies.privacy.noise import (
    below,
    byte_words,
    coin_exp,
    discrete_gaussian,
    log_poisson,
    normal,
    poisson,
    seeded_words,
    skellam,
    uniform,
)

LEAST_P = 1e-4  # seeds are fixed: what passes once passes always


def words(seed: int = 1):
    return seeded_words(rng(seed, 0, -1, "decode"))


def fits(drawn: np.ndarray, values: np.ndarray, probabilities: np.ndarray) -> bool:
    """Chi-square of the counts of neighboring values, in bins of at least 25 expected; the rest is the last bin."""
    counts = np.array([np.count_nonzero(drawn == value) for value in values])
    order, observed, expected, seen, wanted = np.argsort(values), [], [], 0.0, 0.0
    for index in order:
        seen, wanted = seen + counts[index], wanted + probabilities[index] * len(drawn)
        if wanted >= 25:
            observed.append(seen)
            expected.append(wanted)
            seen, wanted = 0.0, 0.0
    observed.append(len(drawn) - sum(observed))
    expected.append(len(drawn) - sum(expected))
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    return float(stats.chisquare(observed, expected).pvalue) > LEAST_P


def test_whole_numbers_below_a_bound_are_uniform() -> None:
    for bound in (1, 2, 3, 10):
        drawn = below(words(), 60_000, bound)
        assert fits(drawn, np.arange(bound), np.full(bound, 1 / bound)) if bound > 1 else not drawn.any()


def test_words_above_the_last_multiple_are_drawn_again() -> None:
    given = iter([np.array([2**64 - 1, 5, 2**64 - 1], np.uint64), np.array([2**64 - 1, 7], np.uint64)])
    more = iter([np.array([8], np.uint64)])
    drawn = below(lambda count: next(given, None) if count > 1 else next(more), 3, 3)
    # 2^64 - 1 is a multiple of 3, so that exactly the last word would favor 0
    assert drawn.tolist() == [8 % 3, 5 % 3, 7 % 3]


@pytest.mark.parametrize(
    ("above", "under"), [(0, 7), (1, 7), (7, 7), (20, 7), (10**12, 10**12), (3 * 10**12, 2 * 10**12)]
)
def test_coins_fall_with_their_probability(above: int, under: int) -> None:
    heads = coin_exp(words(), np.full(100_000, above, np.int64), under).mean()
    p = math.exp(-above / under)
    assert abs(heads - p) <= 4 * math.sqrt(p * (1 - p) / 100_000)


@pytest.mark.parametrize("deviation", [1, 2, 7, 40])
def test_discrete_gaussian_has_its_exact_probabilities(deviation: int) -> None:
    x = np.arange(-9 * deviation, 9 * deviation + 1)
    p = np.exp(-(x**2) / (2 * deviation**2))
    assert fits(discrete_gaussian(words(deviation), 100_000, deviation), x, p / p.sum())


@pytest.mark.parametrize("mean", [0.5, 3, 9.9, 10, 12, 80])
def test_poisson_has_its_probabilities(mean: float) -> None:
    k = np.arange(int(mean + 12 * math.sqrt(mean)) + 12)
    assert fits(poisson(words(), 100_000, mean), k, stats.poisson.pmf(k, mean))


@pytest.mark.parametrize("mean", [0.7, 10, 500])
def test_log_probabilities_of_poisson(mean: float) -> None:
    k = np.array([0, 1, 5, 15, 16, 17, 40, 100, 600])
    np.testing.assert_allclose(log_poisson(k, mean), stats.poisson.logpmf(k, mean), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variance", [1.0, 9.0, 100.0])
def test_skellam_has_its_probabilities(variance: float) -> None:
    x = np.arange(-int(12 * math.sqrt(variance)), int(12 * math.sqrt(variance)) + 1)
    assert fits(skellam(words(), 100_000, variance), x, stats.skellam.pmf(x, variance / 2, variance / 2))


def test_a_hundred_clients_skellam_noise_is_that_of_one() -> None:
    total = sum(skellam(words(client), 50_000, 0.5) for client in range(100))
    x = np.arange(-100, 101)
    assert fits(total, x, stats.skellam.pmf(x, 25, 25))


@pytest.mark.parametrize(
    ("draw", "variance"),
    [
        (lambda source: normal(source, 10**6), 1),
        (lambda source: skellam(source, 10**6, 1e4), 1e4),
        (lambda source: skellam(source, 10**6, 2.0**46), 2.0**46),
        (lambda source: discrete_gaussian(source, 10**6, 100), 1e4),
        (lambda source: discrete_gaussian(source, 10**6, 2**24), 2.0**48),
    ],
    ids=["normal", "skellam", "large skellam", "discrete", "large discrete"],
)
def test_the_variance_of_a_million_draws(draw, variance: float) -> None:
    drawn = draw(words(3)) / math.sqrt(variance)
    assert drawn.var() == pytest.approx(1, rel=0.007)
    assert abs(drawn.mean()) < 5e-3


def test_normal_numbers_are_normal() -> None:
    assert stats.kstest(normal(words(), 100_001), "norm").pvalue > LEAST_P


def test_the_source_decides() -> None:
    assert (normal(words(1), 9) == normal(words(1), 9)).all()
    assert (skellam(words(1), 9, 50) != skellam(words(2), 9, 50)).any()
    system = byte_words(os.urandom)
    assert (skellam(system, 99, 50) != skellam(system, 99, 50)).any()
    assert normal(system, 7).shape == discrete_gaussian(system, 7, 3).shape == (7,)
    count = byte_words(lambda length: bytes(range(length)))
    assert count(2).tolist() == [0x0706050403020100, 0x0F0E0D0C0B0A0908]


def test_uniform_numbers_exclude_both_ends() -> None:
    assert uniform(lambda count: np.zeros(count, np.uint64), 1)[0] > 0
    assert uniform(lambda count: np.full(count, 2**64 - 1, np.uint64), 1)[0] < 1
