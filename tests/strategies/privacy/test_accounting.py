"""Epsilons against published values, closed forms and each other."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.privacy import accounting
from strategies.privacy.accounting import (
    ORDERS,
    Gaussian,
    Scheme,
    least_noise,
    noise_multiplier,
    spent,
)
from strategies.privacy.central import CentralDp
from strategies.privacy.noise import DiscreteGaussianSum, SkellamSum


def epsilon(z: float, scheme: Scheme, steps: int, delta: float) -> float:
    return spent(Gaussian(z), scheme, steps, delta, "client", simulated=False).epsilon


def poisson(rate: float) -> Scheme:
    return Scheme("poisson", rate)


@pytest.mark.parametrize(
    ("rate", "z", "steps", "delta", "expected"),
    [(0.01, 1, 1000, 1e-6, 2.1245), (0.1, 1, 100, 5e-4, 5.1536), (1, 10, 50, 1e-5, 2.9432)],
)
def test_reference_values(rate: float, z: float, steps: int, delta: float, expected: float) -> None:
    # The specification's, computed with the finest grid of dp-accounting 0.6.
    assert epsilon(z, poisson(rate), steps, delta) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("rate", "z", "steps", "delta", "published"),
    [
        (0.01, 4, 10_000, 1e-5, 1.26),  # Abadi et al. 2016 (arXiv 1607.00133), figure 2: the moments accountant
        # TensorFlow Privacy, tutorials/README.md: MNIST in batches of 256 of 60,000 rows for 60, 30, 10 epochs, RDP
        (256 / 60_000, 1.12, 14_062, 1e-5, 2.92),
        (256 / 60_000, 0.6, 7_031, 1e-5, 9.74),
        (256 / 60_000, 1.2, 2_343, 1e-5, 1.20),
    ],
)
def test_published_bounds_are_met_and_improved_on(
    rate: float, z: float, steps: int, delta: float, published: float
) -> None:
    # Conversions from RDP have become better since, and privacy loss distributions are tighter again.
    assert 0.6 * published < epsilon(z, poisson(rate), steps, delta) <= published


@given(st.floats(0.3, 30), st.integers(1, 200), st.sampled_from([1e-3, 1e-5, 1e-8]))
@settings(deadline=None, max_examples=40)
def test_without_sampling_delta_is_the_closed_form(z: float, steps: int, delta: float) -> None:
    # Balle and Wang 2018, theorem 8: delta = Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m), m = sqrt(steps) / z
    cost, m = epsilon(z, Scheme(), steps, delta), math.sqrt(steps) / z
    if cost == 0 or cost > 600:
        return

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    assert phi(m / 2 - cost / m) - math.exp(cost) * phi(-m / 2 - cost / m) == pytest.approx(delta, rel=1e-6)


def test_fixed_cohorts_of_everybody_gain_nothing_and_replace() -> None:
    # One unit in another's place moves the sum by 2 clip: RDP of z / 2, here 4 steps of a / (2 * 25).
    everybody = epsilon(10, Scheme("fixed", 1.0, 50), 4, 1e-5)
    curve = 4 * ORDERS / (2 * 5.0**2)
    # RDP to (epsilon, delta) in its plain form, Mironov 2017, proposition 3; the library's is a little better.
    plain = (curve + math.log(1e5) / (ORDERS - 1)).min()
    assert 0.75 * plain < everybody < plain
    assert epsilon(10, Scheme("fixed", 0.02, 500), 4, 1e-5) < 0.3 * everybody


def test_every_epsilon_says_what_it_means() -> None:
    cost = spent(Gaussian(1), poisson(0.01), 10, 1e-6, "example", simulated=True)
    assert (cost.unit, cost.sampling, cost.relation) == ("example", "poisson", "add or remove one")
    assert (cost.accountant, cost.delta, cost.steps, cost.simulated) == ("PLD", 1e-6, 10, True)
    text = str(cost)
    for part in ("delta 1e-06", "one example", "add or remove one", "Poisson sampling", "10 steps", "PLD", "simulated"):
        assert part in text
    real = spent(Gaussian(1), Scheme(), 10, 1e-6, "client", simulated=False)
    assert "without amplification" in str(real) and "zero out one" in str(real) and "simulated" not in str(real)
    assert "replace one" in str(spent(Gaussian(9), Scheme("fixed", 0.1, 10), 1, 0.01, "client", simulated=False))


def test_no_steps_cost_nothing_and_no_noise_everything() -> None:
    assert epsilon(1, poisson(0.1), 0, 1e-5) == 0
    assert epsilon(0, poisson(0.1), 1, 1e-5) == math.inf


@given(
    st.floats(0.6, 4), st.floats(0.005, 0.3), st.integers(1, 300), st.sampled_from(["poisson", "none"]),
)  # fmt: skip
@settings(deadline=None, max_examples=15)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(z: float, rate: float, steps: int, kind: str) -> None:
    scheme = Scheme("poisson", rate) if kind == "poisson" else Scheme()
    base = epsilon(z, scheme, steps, 1e-5)
    assert epsilon(z, scheme, steps + 1, 1e-5) >= base
    assert epsilon(z * 1.05, scheme, steps, 1e-5) <= base
    assert epsilon(z, scheme, steps, 1e-4) <= base
    if kind == "poisson":
        assert epsilon(z, Scheme("poisson", rate * 1.05), steps, 1e-5) >= base
        assert base <= epsilon(z, Scheme(), steps, 1e-5) * 1.001


@pytest.mark.parametrize("scheme", [Scheme(), poisson(0.02), Scheme("poisson", 0.02, 2000, 60)])
def test_the_noise_found_reaches_the_target_and_not_much_less_would(scheme: Scheme) -> None:
    z = noise_multiplier(3.0, scheme, 100, 1e-5)
    assert epsilon(z, scheme, 100, 1e-5) <= 3.0 < epsilon(z * 0.999, scheme, 100, 1e-5)


def test_a_search_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = noise_multiplier(2.5, poisson(0.013), 30, 1e-5)
    monkeypatch.setattr(accounting, "least_noise", None)
    assert noise_multiplier(2.5, poisson(0.013), 30, 1e-5) == first


@pytest.mark.parametrize("scheme", [poisson(0.01), Scheme("poisson", 0.01, 10_000, 180)], ids=["poisson", "capped"])
def test_the_loss_of_a_step_is_computed_for_few_of_a_run_s_rounds(scheme: Scheme) -> None:
    accounting._poisson_loss.cache_clear()
    costs = [epsilon(1.1, scheme, steps, 1e-5) for steps in range(1, 41)]
    assert accounting._poisson_loss.cache_info().misses == 6  # up to 1, 3, 7, 15, 31 and 63 steps
    assert costs == sorted(costs)


def test_searches_end_at_both_ends() -> None:
    assert least_noise(lambda z: 0.0, 1.0) == pytest.approx(accounting.LEAST, rel=1)
    with pytest.raises(ValueError, match=r"no noise multiplier up to 1e\+06 gives epsilon 1\.0"):
        least_noise(lambda z: 2.0, 1.0)


def test_a_cap_costs_little_where_it_is_rare_and_much_where_it_is_not() -> None:
    free = epsilon(1, poisson(0.01), 100, 1e-6)
    assert epsilon(1, Scheme("poisson", 0.01, 10_000, 180), 100, 1e-6) == pytest.approx(free, rel=1e-3)
    assert epsilon(1, Scheme("poisson", 0.01, 10_000, 110), 100, 1e-6) > 1.1 * free


def test_ring_noise_costs_what_normal_noise_does_where_steps_are_fine() -> None:
    normal = epsilon(2.0, Scheme(), 20, 1e-5)
    for noise in (SkellamSum(4e12, 1e6, 1e9), DiscreteGaussianSum(100, 200_000, 1e6, 2**20)):
        cost = spent(noise, Scheme(), 20, 1e-5, "client", simulated=False)
        assert cost.accountant == "RDP"
        assert normal < cost.epsilon < 1.12 * normal


def test_the_skellam_bound_is_above_the_exact_divergence() -> None:
    special = pytest.importorskip("scipy.special")
    for variance, shift in [(4, 1), (20, 1), (20, 3), (400, 10)]:
        k = np.arange(-150, 151)
        with np.errstate(divide="ignore"):
            logs = np.log(special.ive(np.abs(k), variance))
        here, there = logs[shift:], logs[:-shift]
        sane = np.isfinite(here) & np.isfinite(there)
        for order in (2, 3, 8):
            exact = np.logaddexp.reduce((order * here - (order - 1) * there)[sane]) / (order - 1)
            bound = SkellamSum(variance, shift, shift).rdp(np.array([order]))[0]
            assert exact <= bound < exact * (1.02 if variance == 400 else 2)


def test_the_bound_on_sums_of_discrete_gaussians_is_above_the_exact_divergence() -> None:
    for clients, deviation, shift in [(2, 1, 1), (5, 1, 2), (3, 2, 3)]:
        x = np.arange(-60, 61)
        single = np.exp(-(x**2) / (2.0 * deviation**2))
        total = single = single / single.sum()
        for _ in range(clients - 1):
            total = np.convolve(total, single)
        total = total[total > 1e-280]
        for order in (2, 3, 8):
            here, there = np.log(total[shift:]), np.log(total[:-shift])
            exact = np.logaddexp.reduce(order * here - (order - 1) * there) / (order - 1)
            bound = DiscreteGaussianSum(clients, deviation, shift, 1).rdp(np.array([order]))[0]
            assert exact <= bound * (1 + 1e-9)


@pytest.mark.parametrize("delta", [0, 1, -1e-5])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        CentralDp(noise_multiplier=1.0, delta=delta)


def test_schemes_and_targets_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="sampling rate is above 0 and at most 1, not 0"):
        Scheme("poisson", 0)
    with pytest.raises(ValueError, match="need to know the population"):
        Scheme("fixed", 0.5)
    with pytest.raises(ValueError, match="must be a number above 0, not 0"):
        CentralDp(epsilon=0)
