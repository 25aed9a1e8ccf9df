from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.drift import Scaffold
from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import Update

FIRST = [
    Update(0, 1.0, torch.tensor([-0.2, 0.4, 0.0]), metrics={"rates": 0.2}),
    Update(1, 0.5, torch.tensor([0.4, 0.0, -0.4]), metrics={"rates": 0.4}),
]


def test_a_round(first_state: Any, play_round: Any) -> None:
    strategy = Scaffold()
    state, sent, client_states = play_round(strategy, first_state(strategy), FIRST)
    # theta += ([-0.2, 0.4, 0] + [0.4, 0, -0.4]) / 2
    torch.testing.assert_close(state.params, torch.tensor([10.1, 20.2, 29.8]))
    # c_k+ = 0 - 0 - delta / rates
    torch.testing.assert_close(client_states[0]["c"], torch.tensor([1.0, -2.0, 0.0]))
    torch.testing.assert_close(client_states[1]["c"], torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(sent[0].extras["c"], client_states[0]["c"])
    # c = 0 + ([1, -2, 0] + [-1, 0, 1]) / 4: over the population, not the cohort
    torch.testing.assert_close(state.moments["c"], torch.tensor([0.0, -0.5, 0.25]))


def test_a_second_round_of_one_client(first_state: Any, play_round: Any) -> None:
    strategy = Scaffold()
    state, _, client_states = play_round(strategy, first_state(strategy), FIRST)
    broadcast = strategy.broadcast(state)
    known, new = torch.full((1, 3), 10.0), torch.full((1, 3), 10.0)
    strategy.correct(known, torch.ones(1, 3), broadcast, client_states[0])
    strategy.correct(new, torch.ones(1, 3), broadcast, {})
    # 10 - c_k + c = 10 - [1, -2, 0] + [0, -0.5, 0.25]; of a client that is new, c_k = 0
    torch.testing.assert_close(known, torch.tensor([[9.0, 11.5, 10.25]]))
    torch.testing.assert_close(new, torch.tensor([[10.0, 9.5, 10.25]]))

    again = Update(0, 1.0, torch.tensor([0.2, 0.0, -0.2]), metrics={"rates": 0.2})
    state, sent, after = play_round(strategy, state, [again], client_states)
    # c_k+ - c_k = -c - delta / rates = [0, 0.5, -0.25] + [-1, 0, 1]; c_k = [1, -2, 0] before
    torch.testing.assert_close(sent[0].extras["c"], torch.tensor([-1.0, 0.5, 0.75]))
    torch.testing.assert_close(after[0]["c"], torch.tensor([0.0, -1.5, 0.75]))
    assert torch.equal(after[1]["c"], client_states[1]["c"])
    # c = [0, -0.5, 0.25] + [-1, 0.5, 0.75] / 4; theta = [10.1, 20.2, 29.8] + [0.2, 0, -0.2]
    torch.testing.assert_close(state.moments["c"], torch.tensor([-0.25, -0.375, 0.4375]))
    torch.testing.assert_close(state.params, torch.tensor([10.3, 20.2, 29.6]))


def test_the_server_learning_rate_moves_the_model_alone(first_state: Any, play_round: Any) -> None:
    strategy = Scaffold(lr=0.5)
    state, _, _ = play_round(strategy, first_state(strategy), FIRST)
    torch.testing.assert_close(state.params, torch.tensor([10.05, 20.1, 29.9]))
    torch.testing.assert_close(state.moments["c"], torch.tensor([0.0, -0.5, 0.25]))


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.integers(0, 3), st.tuples(*[st.floats(-2, 2, width=32)] * 3), min_size=1),
        min_size=1,
        max_size=5,
    )
)
def test_c_is_always_the_mean_of_all_clients_c_k(
    first_state: Any, play_round: Any, rounds: list[dict[int, tuple[float, ...]]]
) -> None:
    strategy = Scaffold()
    state, client_states = first_state(strategy), {}
    for cohort in rounds:
        updates = [Update(k, 1.0, torch.tensor(delta), metrics={"rates": 0.5}) for k, delta in cohort.items()]
        state, _, client_states = play_round(strategy, state, updates, client_states)
    mean = sum(client_state["c"] for client_state in client_states.values()) / 4
    torch.testing.assert_close(state.moments["c"], mean, rtol=1e-5, atol=1e-5)


def test_it_finds_the_optimum_that_fedavg_misses(solve_quadratics: Any) -> None:
    curvatures, optima = (1.0, 4.0, 1.0, 2.0), (0.0, 1.0, 2.0, -1.0)
    # sum a (x - b) = 0 at x = (0 + 4 + 2 - 2) / 8
    assert solve_quadratics(Scaffold(), curvatures, optima, 60) == pytest.approx(0.5, abs=1e-4)
    # A round moves client k by a share s = 1 - (1 - 0.1 a)^5 of its way: x = sum s b / sum s,
    # s = 0.40951, 0.92224, 0.40951, 0.67232: (0.92224 + 0.81902 - 0.67232) / 2.41358
    assert solve_quadratics(FedAvg(), curvatures, optima, 60) == pytest.approx(0.44289, abs=1e-4)


def test_two_vectors_travel_each_way(first_state: Any) -> None:
    assert Scaffold().floats(Scaffold().broadcast(first_state(Scaffold()))) == (6, 6)
