import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.fedavg import FedAvg
from strategies.averaging.reweighting import QFedAvg
from strategies.core.protocol import Update

LOCAL = {"steps": 4.0, "rates": 0.4}
CLIENTS = [
    Update(0, 1.0, torch.tensor([1.0, 0.0, 2.0]), metrics=LOCAL | {"loss_before": 2.0}),
    Update(1, 0.5, torch.tensor([0.0, 2.0, 0.0]), metrics=LOCAL | {"loss_before": 0.5}),
]


def moved(play_round: Any, first_state: Any, strategy: QFedAvg, clients: list[Update] = CLIENTS) -> torch.Tensor:
    state = first_state(strategy)
    return play_round(strategy, state, clients)[0].params - state.params


def test_a_round(first_state: Any, play_round: Any) -> None:
    # q = 1, L = 2: D = 2 * 2 [1, 0, 2] = [4, 0, 8], h = 1 * |[2, 0, 4]|^2 + 2 * 2 = 24;
    # D = 0.5 * 2 [0, 2, 0] = [0, 2, 0], h = 1 * |[0, 4, 0]|^2 + 2 * 0.5 = 17
    strategy = QFedAvg(q=1.0, lipschitz=2.0)
    expected = torch.tensor([4.0, 2.0, 8.0]) / 41
    torch.testing.assert_close(moved(play_round, first_state, strategy), expected, rtol=1e-4, atol=1e-5)
    half = replace(strategy, lr=0.5)
    torch.testing.assert_close(moved(play_round, first_state, half), expected / 2, rtol=1e-4, atol=1e-5)


def test_a_higher_q(first_state: Any, play_round: Any) -> None:
    # q = 2, L = 2: D = 4 * 2 [1, 0, 2], h = 2 * 2 * 20 + 2 * 4 = 88; D = 0.25 * 2 [0, 2, 0], h = 2 * 0.5 * 16 + 0.5
    change = moved(play_round, first_state, QFedAvg(q=2.0, lipschitz=2.0))
    torch.testing.assert_close(change, torch.tensor([8.0, 1.0, 16.0]) / 104.5, rtol=1e-4, atol=1e-5)


def test_l_is_one_over_the_local_learning_rate_unless_given(first_state: Any, play_round: Any) -> None:
    # L = 4 / 0.4 = 10: D = [20, 0, 40], h = 500 + 20; D = [0, 10, 0], h = 400 + 5
    change = moved(play_round, first_state, QFedAvg())
    torch.testing.assert_close(change, torch.tensor([20.0, 10.0, 40.0]) / 925, rtol=1e-4, atol=1e-5)


def test_weighted_by_examples(first_state: Any, play_round: Any) -> None:
    # the second client's D and h, of q = 1 and L = 2, count half: [0, 1, 0] and 8.5
    change = moved(play_round, first_state, QFedAvg(lipschitz=2.0, weighting="examples"))
    torch.testing.assert_close(change, torch.tensor([4.0, 1.0, 8.0]) / 32.5, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.125, 8), st.floats(-4, 4, width=32)), min_size=1, max_size=5),
    st.sampled_from(["examples", "uniform"]),
)
def test_with_q_zero_it_is_fedavg(
    first_state: Any, play_round: Any, clients: list[tuple[float, float]], weighting: Any
) -> None:
    updates = [
        Update(k, 1 / (k + 1), torch.tensor([x, -x, 1.0]), metrics=LOCAL | {"loss_before": loss})
        for k, (loss, x) in enumerate(clients)
    ]
    ours, _, _ = play_round(QFedAvg(q=0.0, weighting=weighting), first_state(QFedAvg()), updates)
    theirs, _, _ = play_round(FedAvg(weighting=weighting), first_state(FedAvg()), updates)
    torch.testing.assert_close(ours.params, theirs.params)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 3.0])
def test_a_client_without_loss_is_no_division_by_zero(first_state: Any, play_round: Any, q: float) -> None:
    clients = [replace(CLIENTS[0], metrics=LOCAL | {"loss_before": 0.0}, delta=torch.zeros(3)), CLIENTS[1]]
    assert moved(play_round, first_state, QFedAvg(q=q), clients).isfinite().all()


def test_it_asks_for_the_loss_before_and_sends_one_number_more(first_state: Any) -> None:
    assert QFedAvg.loss_before
    assert QFedAvg().floats(QFedAvg().broadcast(first_state(QFedAvg()))) == (3, 4)


@pytest.mark.parametrize("q", [-1.0, math.inf, math.nan])
def test_a_q_that_favors_the_lucky_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.q .* must be at least 0, not"):
        QFedAvg(q=q)


@pytest.mark.parametrize("lipschitz", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_lipschitz_constant_is_refused(lipschitz: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.lipschitz .* must be a number above 0, not"):
        QFedAvg(lipschitz=lipschitz)
