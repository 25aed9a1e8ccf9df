import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition.core.draws import BLOCK, exp, log, log_gamma, normal


@given(st.floats(1e-300, 1e300))
def test_the_logarithm_is_right_to_about_the_last_bit(x):
    assert float(log(np.array([x]))[0]) == pytest.approx(math.log(x), rel=5e-16, abs=2e-16)


@given(st.floats(-700, 700))
def test_the_exponential_is_right_to_about_the_last_bit(x):
    assert float(exp(np.array([x]))[0]) == pytest.approx(math.exp(x), rel=5e-16)


def test_what_is_too_small_for_a_float_is_0():
    assert exp(np.array([-1e9, -np.inf, -760.0])).tolist() == [0.0, 0.0, 0.0]


def test_the_bits_are_the_same_on_any_machine(rng):
    # Made on x86-64 Linux. Draws change with NumPy only if its stream of uniform numbers does.
    draw = rng()
    numbers = [
        *log(np.array([0.3, 0.75, 12345.678])),
        *exp(np.array([0.75, -33.3, 512.1])),
        *normal(draw, 3),
        *log_gamma(draw, 0.3, 3),
    ]
    assert [float(number).hex() for number in numbers] == [
        "-0x1.34378fcbda721p+0",
        "-0x1.269621134db92p-2",
        "0x1.2d79559791e31p+3",
        "0x1.0ef9db467dcf8p+1",
        "0x1.f165bb9b59d94p-49",
        "0x1.befff42eef278p+738",
        "0x1.18e81386b7371p-2",
        "0x1.03362742ffbffp-1",
        "-0x1.e206531287aeap-2",
        "-0x1.a78c02f59ad76p+2",
        "-0x1.0b19269b7c868p+1",
        "-0x1.f465d9a907c9fp+0",
    ]


def ks(draws, law):
    """Kolmogorov and Smirnov's distance between draws and a law, times the root of their number."""
    from scipy import stats

    return stats.kstest(draws, *law).statistic * math.sqrt(len(draws))


def test_normal_draws_are_normal(rng):
    assert ks(normal(rng(), 3 * BLOCK + 1), ("norm",)) < 1.6  # the 1% point
    assert [len(normal(rng(), size)) for size in (0, 1, 2, 5)] == [0, 1, 2, 5]


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0, 100.0])
def test_gamma_draws_follow_their_law(alpha, rng):
    assert ks(exp(log_gamma(rng(), alpha, 3 * BLOCK + 1)), ("gamma", (alpha,))) < 1.6


def test_gamma_draws_do_not_vanish_for_a_tiny_alpha(rng):
    logs = log_gamma(rng(), 1e-4, 1000)
    assert np.isfinite(logs).all() and (logs < -800).any()
