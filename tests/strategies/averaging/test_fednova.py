from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.fedavg import FedAvg
from strategies.averaging.reweighting import FedNova, accumulated
from strategies.core.protocol import Update

CLIENTS = [
    Update(0, 1.0, torch.tensor([2.0, 4.0, -2.0]), metrics={"steps": 2.0}),
    Update(1, 0.5, torch.tensor([4.0, 0.0, 8.0]), metrics={"steps": 4.0}),
]


def test_a_round_of_plain_sgd(first_state: Any, play_round: Any) -> None:
    # p = 2/3, 1/3; sum p tau = 8/3; sum p delta / tau = 2/3 [1, 2, -1] + 1/3 [1, 0, 2] = [1, 4/3, 0]
    state, sent, _ = play_round(FedNova(), first_state(FedNova()), CLIENTS)
    torch.testing.assert_close(state.params, torch.tensor([10 + 8 / 3, 20 + 32 / 9, 30.0]))
    assert [update.weight for update in sent] == [0.5, 0.125]
    assert [update.extras["weights"].tolist() for update in sent] == [[1, 2], [0.5, 2]]


def test_a_round_with_local_momentum(first_state: Any, play_round: Any) -> None:
    # tau = 1 + 1.5 = 2.5 and 1 + 1.5 + 1.75 + 1.875 = 6.125; sum p tau = (5 + 6.125) / 3 = 11.125 / 3;
    # sum p delta / tau = 2/3 [0.8, 1.6, -0.8] + 1/3 [4, 0, 8] / 6.125 = [0.7510204, 1.0666667, -0.0979592]
    state, _, _ = play_round(FedNova(momentum=0.5), first_state(FedNova()), CLIENTS)
    torch.testing.assert_close(state.params, torch.tensor([12.7850340, 23.9555556, 29.6367347]))


def test_weighting_and_the_server_learning_rate(first_state: Any, play_round: Any) -> None:
    # p = 1/2; sum p tau = 3; sum p delta / tau = 1/2 [1, 2, -1] + 1/2 [1, 0, 2] = [1, 1, 0.5]; half of it
    strategy = FedNova(weighting="uniform", lr=0.5)
    state, _, _ = play_round(strategy, first_state(strategy), CLIENTS)
    torch.testing.assert_close(state.params, torch.tensor([11.5, 21.5, 30.75]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.125, 1, width=16), st.floats(-4, 4, width=32)), min_size=1, max_size=5))
def test_with_equal_steps_it_is_fedavg(first_state: Any, play_round: Any, clients: list[tuple[float, float]]) -> None:
    updates = [Update(k, w, torch.tensor([x, -x, 1.0]), metrics={"steps": 7.0}) for k, (w, x) in enumerate(clients)]
    for momentum in (0.0, 0.9):
        ours, _, _ = play_round(FedNova(momentum=momentum), first_state(FedNova()), updates)
        theirs, _, _ = play_round(FedAvg(), first_state(FedAvg()), updates)
        torch.testing.assert_close(ours.params, theirs.params, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 20), st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_tau_is_what_torchs_sgd_accumulates(steps: int, momentum: float) -> None:
    """On a gradient of one everywhere, a learning rate of one moves by |a|_1."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=1.0, momentum=momentum)
    for _ in range(steps):
        x.grad = torch.ones(1, dtype=torch.float64)
        sgd.step()
    assert accumulated(float(steps), momentum) == pytest.approx(-x.item())


def test_two_more_numbers_go_up(first_state: Any) -> None:
    assert FedNova().floats(FedNova().broadcast(first_state(FedNova()))) == (3, 5)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_that_does_not_fade_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.momentum .* must be at least 0 and below 1"):
        FedNova(momentum=momentum)
