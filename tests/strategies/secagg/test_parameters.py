import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.secagg.parameters import Parameters, choose, neighbors


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (100, [(12, 6), (16, 11), (28, 11), (52, 32)]),
        (1000, [(30, 17), (52, 37), (66, 31), (194, 124)]),
        (10000, [(34, 20), (62, 44), (78, 37), (280, 179)]),
    ],
)
def test_the_table(n, expected):
    rows = [
        choose(n, corrupt, dropout, lies) for corrupt, dropout in ((0.05, 0.05), (0.1, 0.2)) for lies in (False, True)
    ]
    assert [(row.degree, row.threshold) for row in rows] == expected


@pytest.mark.parametrize("n", [2, 3, 10, 50, 99])
def test_small_cohorts_get_the_complete_graph_and_a_majority(n):
    assert choose(n) == Parameters(n, n - 1, max(2, n // 2 + 1))


def test_a_lying_server_asks_for_more_shares():
    # 2 of 20 corrupt: t shares of each kind are out of reach if 2 t > 20 + 2
    assert choose(20, 0.1, 0.2, semi_malicious=True).threshold == 12
    assert choose(20, 0.1, 0.2, active=True) == Parameters(20, 19, 12, active=True)
    # 5 of 20 drop out, and a majority would be 11
    assert choose(20, 0.1, 0.6).threshold == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (20, 0.4, 0.4, True),
            "no threshold tolerates 8 corrupt clients and 8 drop-outs of 20: 15 shares would be needed",
        ),
        ((20, -0.1), "must be in"),
        ((20, 0.1, 1.0), "must be in"),
        ((1,), "at least 2 clients"),
    ],
)
def test_what_cannot_be_borne_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((1, 0, 2), "at least 2 clients"),
        ((10, 3, 2), "9 or an even number"),
        ((10, 10, 2), "9 or an even number"),
        ((10, 9, 1), "2 to 10"),
        ((10, 9, 11), "2 to 10"),
        ((10, 4, 5), "2 to 4"),
        ((10, 4, 3, True), "complete graph"),
        ((10, 9, 5, True), "above half"),
        ((201, 200, 150, True), "at most 200"),
    ],
)
def test_parameters_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Parameters(*fields)


def test_a_ring_by_hand():
    parameters = Parameters(6, 4, 2)
    assert neighbors("abcdef", 0, parameters) == ("e", "f", "b", "c")
    assert neighbors("abcdef", 4, parameters) == ("c", "d", "f", "a")
    assert neighbors("abc", 1, Parameters(3, 2, 2)) == ("a", "c")


@given(st.integers(5, 40), st.data())
def test_neighbors_are_mutual_and_as_many_as_agreed(n, data):
    k = data.draw(st.sampled_from([*range(2, n - 1, 2), n - 1]))
    order = data.draw(st.permutations(range(n)))
    near = {u: neighbors(order, place, Parameters(n, k, 2)) for place, u in enumerate(order)}
    assert all(len(set(near[u])) == k and u not in near[u] for u in order)
    assert all(u in near[v] for u in order for v in near[u])


@settings(max_examples=20, deadline=None)
@given(st.integers(100, 300), st.sampled_from([(0.05, 0.05), (0.1, 0.1)]))
def test_the_chosen_threshold_holds_in_exact_arithmetic(n, rates):
    corrupt, dropout = rates
    parameters = choose(n, corrupt, dropout)
    k, t = parameters.degree, parameters.threshold

    def chances(marked):
        return [Fraction(math.comb(marked, x) * math.comb(n - marked, k - x), math.comb(n, k)) for x in range(k + 1)]

    assert sum(chances(int(n * corrupt))[t:]) <= Fraction(1, 2**41 * n)
    assert sum(chances(math.ceil(n * (1 - dropout)))[:t]) <= Fraction(1, 2**20 * n)
