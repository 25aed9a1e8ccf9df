import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.drift import FedDyn
from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import Update

FIRST = [Update(0, 1.0, torch.tensor([2.0, 0.0, -4.0])), Update(1, 0.5, torch.tensor([0.0, 4.0, 2.0]))]


def test_a_round(first_state: Any, play_round: Any) -> None:
    strategy = FedDyn(alpha=0.5)
    state, _, client_states = play_round(strategy, first_state(strategy), FIRST)
    # h = 0 - 0.5 * [2, 4, -2] / 4: over the population; theta = theta_t + [1, 2, -1] - h / 0.5
    assert state.moments["h"].tolist() == [-0.25, -0.5, 0.25]
    assert state.params.tolist() == [11.5, 23, 28.5]
    # h_k = 0 - 0.5 delta
    assert [client_states[k]["h"].tolist() for k in (0, 1)] == [[-1, 0, 2], [0, -2, -1]]


def test_a_second_round_of_one_client(first_state: Any, play_round: Any) -> None:
    strategy = FedDyn(alpha=0.5)
    state, _, client_states = play_round(strategy, first_state(strategy), FIRST)
    broadcast, params = strategy.broadcast(state), torch.tensor([[12.5, 21.0, 28.5]])
    known, new = torch.full((1, 3), 10.0), torch.full((1, 3), 10.0)
    strategy.correct(known, params, broadcast, client_states[0])
    strategy.correct(new, params, broadcast, {})
    # 10 + 0.5 (theta - [11.5, 23, 28.5]) - h_k = 10 + [0.5, -1, 0] - [-1, 0, 2]; of a client that is new, h_k = 0
    assert known.tolist() == [[11.5, 9, 8]]
    assert new.tolist() == [[10.5, 9, 10]]

    state, _, after = play_round(strategy, state, [Update(0, 1.0, torch.tensor([2.0, 2.0, 0.0]))], client_states)
    # h = [-0.25, -0.5, 0.25] - 0.5 [2, 2, 0] / 4 = [-0.5, -0.75, 0.25]; theta = [11.5, 23, 28.5] + [2, 2, 0] - 2 h
    assert state.moments["h"].tolist() == [-0.5, -0.75, 0.25]
    assert state.params.tolist() == [14.5, 26.5, 28]
    # h_k = [-1, 0, 2] - 0.5 [2, 2, 0]
    assert after[0]["h"].tolist() == [-2, -1, 2]
    assert torch.equal(after[1]["h"], client_states[1]["h"])


def test_alpha_and_the_server_learning_rate_count(first_state: Any, play_round: Any) -> None:
    # half of the way [1.5, 3, -1.5]
    strategy = FedDyn(alpha=0.5, lr=0.5)
    assert play_round(strategy, first_state(strategy), FIRST)[0].params.tolist() == [10.75, 21.5, 29.25]
    # alpha cancels in the first round's theta, not in what is remembered
    strategy = FedDyn(alpha=0.25)
    state, _, client_states = play_round(strategy, first_state(strategy), FIRST)
    assert state.moments["h"].tolist() == [-0.125, -0.25, 0.125]
    assert client_states[0]["h"].tolist() == [-0.5, 0, 1]


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.integers(0, 3), st.tuples(*[st.floats(-2, 2, width=32)] * 3), min_size=1),
        min_size=1,
        max_size=5,
    )
)
def test_h_is_always_the_mean_of_all_clients_h_k(
    first_state: Any, play_round: Any, rounds: list[dict[int, tuple[float, ...]]]
) -> None:
    strategy = FedDyn(alpha=0.5)
    state, client_states = first_state(strategy), {}
    for cohort in rounds:
        updates = [Update(k, 1.0, torch.tensor(delta)) for k, delta in cohort.items()]
        state, _, client_states = play_round(strategy, state, updates, client_states)
    mean = sum(client_state["h"] for client_state in client_states.values()) / 4
    torch.testing.assert_close(state.moments["h"], mean, rtol=1e-5, atol=1e-5)


def test_it_finds_the_optimum_that_fedavg_misses(solve_quadratics: Any) -> None:
    curvatures, optima = (1.0, 4.0, 1.0, 2.0), (0.0, 3.0, 0.0, 1.0)
    # sum a (x - b) = 0 at x = (12 + 2) / 8; under FedAvg all clients come home, each almost to its b: their mean
    assert solve_quadratics(FedDyn(alpha=1.0), curvatures, optima, 80, steps=50) == pytest.approx(1.75, abs=1e-3)
    assert solve_quadratics(FedAvg(), curvatures, optima, 80, steps=50) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_that_pulls_nowhere_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.alpha .* must be a number above 0, not"):
        FedDyn(alpha=alpha)
