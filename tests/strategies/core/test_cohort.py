import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.core.cohort import PoissonCohort, UniformCohort


@given(st.one_of(st.integers(1, 40), st.integers(1, 10**9)), st.data())
def test_cohorts_are_sorted_distinct_and_of_the_size_asked(clients: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, min(clients, 40)))
    cohort = UniformCohort(size=size).sample(clients, data.draw(st.integers(0, 99)), 3).tolist()
    assert cohort == sorted(set(cohort))
    assert len(cohort) == size
    assert cohort[0] >= 0 and cohort[-1] < clients


def test_seed_and_round_decide() -> None:
    cohort, clients = UniformCohort(size=4), 100
    assert cohort.sample(clients, 7, 0).tolist() == cohort.sample(clients, 7, 0).tolist() == [22, 27, 53, 99]
    assert cohort.sample(clients, 7, 1).tolist() == [14, 42, 87, 98]
    assert cohort.sample(clients, 8, 0).tolist() != [22, 27, 53, 99]


def test_every_client_is_drawn_equally_often() -> None:
    rounds, size, population = 2000, 5, 20
    cohort, clients = UniformCohort(size=size), population
    counts = np.bincount(np.concatenate([cohort.sample(clients, 1, r) for r in range(rounds)]), minlength=population)
    expected = rounds * size / population
    # Chi-square with 19 degrees of freedom: beyond 43.8 once in a thousand seeds. This seed is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8
    assert len({tuple(cohort.sample(clients, 1, r)) for r in range(100)}) > 90


def test_too_few_clients_are_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"cohort\.size is 5, but only 4 clients can train"):
        UniformCohort(size=5).sample(4, 7, 0)


def test_an_empty_cohort_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cohort\.size must be at least 1, not 0"):
        UniformCohort(size=0)


@given(st.one_of(st.integers(1, 40), st.integers(1, 10**9)), st.data())
def test_poisson_cohorts_are_sorted_distinct_and_capped(clients: int, data: st.DataObject) -> None:
    size = data.draw(st.floats(0.1, min(clients, 40)))
    cap = data.draw(st.none() | st.integers(1, 20))
    cohort = PoissonCohort(size=size, cap=cap).sample(clients, data.draw(st.integers(0, 99)), 3).tolist()
    assert cohort == sorted(set(cohort))
    assert len(cohort) <= PoissonCohort(size=size, cap=cap).largest(clients)
    assert all(0 <= client < clients for client in cohort)


def test_everybody_takes_part_at_rate_1() -> None:
    assert PoissonCohort(rate=1.0).sample(5, 7, 0).tolist() == [0, 1, 2, 3, 4]


def test_poisson_cohorts_are_independent_coins() -> None:
    rounds, population = 4000, 12
    seen = np.zeros((rounds, population))
    for round_ in range(rounds):
        seen[round_, PoissonCohort(rate=0.3).sample(population, 1, round_)] = 1
    # of each client and each pair 4 standard deviations, of the size the binomial's variance
    assert np.abs(seen.mean(0) - 0.3).max() < 4 * (0.3 * 0.7 / rounds) ** 0.5
    assert np.abs(np.corrcoef(seen.T) - np.eye(population)).max() < 4.5 / rounds**0.5
    assert abs(seen.sum(1).var() / (population * 0.3 * 0.7) - 1) < 0.1


def test_the_cap_cuts_at_random() -> None:
    counts = np.zeros(6)
    for round_ in range(3000):
        counts[PoissonCohort(rate=1.0, cap=2).sample(6, 1, round_)] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # 5 degrees of freedom: once in a thousand seeds


def test_a_poisson_cohort_may_be_empty_and_says_what_to_expect() -> None:
    cohort = PoissonCohort(size=0.01)
    assert cohort.sample(10, 1, 0).tolist() == []
    assert PoissonCohort(rate=0.2).expected(50) == PoissonCohort(size=10).expected(1000) == 10
    assert UniformCohort(size=4).expected(9) == UniformCohort(size=4).largest(9) == 4
    assert (PoissonCohort(rate=0.2).largest(50), PoissonCohort(rate=0.2, cap=7).largest(50)) == (50, 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, r"needs cohort\.rate or cohort\.size, one of them"),
        ({"rate": 0.1, "size": 3}, r"needs cohort\.rate or cohort\.size, one of them"),
        ({"rate": 0.0}, r"cohort\.rate is each client's probability and must be above 0 and at most 1, not 0\.0"),
        ({"size": 0.0}, r"cohort\.size is the expected number of clients and must be a number above 0"),
        ({"rate": 0.1, "cap": 0}, r"cohort\.cap is the largest number of clients and must be at least 1, not 0"),
    ],
)
def test_faults_of_poisson_cohorts(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoissonCohort(**wrong)


def test_too_few_clients_for_the_expected_size() -> None:
    with pytest.raises(ValueError, match=r"cohort\.size is 5, but only 4 clients can train"):
        PoissonCohort(size=5).sample(4, 7, 0)
