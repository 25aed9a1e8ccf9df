"""CMA-ES against its author's package, and its laws."""

from dataclasses import replace

import cma
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.black_box.evolution import Constants, Evolution
from strategies.core.seeds import rng

DIMENSION, GENERATIONS = 8, 50


def sphere(candidates_LD):
    return (candidates_LD**2).sum(1)


@pytest.mark.parametrize("population", [6, 10, 16])
def test_the_same_numbers_as_the_package_cma_on_the_sphere(population):
    start = np.linspace(-1.0, 2.0, DIMENSION)
    options = {"popsize": population, "CMA_active": False, "CMA_mirrors": 0, "verbose": -9, "seed": 1}
    theirs = cma.CMAEvolutionStrategy(start, 0.5, options)
    # The package begins a little off the identity, so that no two eigenvalues are equal.
    ours = replace(Evolution.begun(start, 0.5), covariance_DD=theirs.sm.C.copy())
    for generation in range(GENERATIONS):
        candidates_LD = ours.candidates(rng(1, generation, -1, "candidates").standard_normal((population, DIMENSION)))
        theirs.ask()
        theirs.tell(list(candidates_LD), list(sphere(candidates_LD)), check_points=False)
        ours = ours.after(candidates_LD, sphere(candidates_LD))
        np.testing.assert_allclose(ours.mean_D, theirs.mean, rtol=0, atol=1e-9)
        assert abs(ours.sigma - theirs.sigma) < 1e-9
        np.testing.assert_allclose(ours.covariance_DD, theirs.sm.C, rtol=0, atol=1e-9)
    assert sphere(ours.mean_D[None])[0] < 1e-3 * sphere(start[None])[0]


def test_the_first_generation_by_hand():
    # Two candidates: all weight is the better one's, so that mu_eff is 1 and c_mu 0.
    rates = Constants.of(1, 2)
    np.testing.assert_allclose(rates.weights_L, [1.0, 0.0])
    assert (rates.mass, rates.sigma_rate) == (1.0, 0.5)  # 3 / 5, at most a half
    after = Evolution.begun(np.array([0.0]), 1.0).after(np.array([[2.0], [1.0]]), np.array([5.0, 4.0]))
    np.testing.assert_allclose(after.mean_D, [1.0])
    np.testing.assert_allclose(after.sigma_path_D, [np.sqrt(0.75)])


@given(st.integers(0, 10_000), st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_only_the_order_of_losses_counts(seed, factor, shift):
    draws = np.random.default_rng(seed)
    state, candidates_LD = Evolution.begun(draws.normal(size=4), 1.0), draws.normal(size=(6, 4))
    losses_L = draws.normal(size=6)
    first, second = state.after(candidates_LD, losses_L), state.after(candidates_LD, factor * losses_L + shift)
    np.testing.assert_array_equal(first.mean_D, second.mean_D)
    np.testing.assert_array_equal(first.covariance_DD, second.covariance_DD)


def test_losses_that_are_all_equal_keep_the_order_of_candidates():
    state, candidates_LD = Evolution.begun(np.zeros(2), 1.0), np.arange(8.0).reshape(4, 2)
    after = state.after(candidates_LD, np.ones(4))
    weights_L = Constants.of(2, 4).weights_L
    np.testing.assert_allclose(after.mean_D, weights_L @ candidates_LD)
