import math

import pytest
import torch

from strategies.averaging.drift import FedProx
from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import Aggregate, Broadcast, ServerState

GOT = Broadcast(0, torch.tensor([1.0, 2.0, 3.0]))
PARAMS_KP = torch.tensor([[1.0, 4.0, -1.0], [3.0, 2.0, 3.0]])


def corrected(strategy: FedAvg) -> list[list[float]]:
    grad = torch.tensor([[10.0, 10.0, 10.0], [0.0, 0.0, 0.0]])
    strategy.correct(grad, PARAMS_KP, GOT, {})
    return grad.tolist()


def test_mu_adds_exactly_its_pull_to_each_client_of_a_pack() -> None:
    # theta - theta_t = [[0, 2, -4], [2, 0, 0]]
    assert corrected(FedProx(mu=0.5)) == [[10, 11, 8], [1, 0, 0]]


def test_without_mu_it_is_fedavg() -> None:
    assert corrected(FedProx(mu=0.0)) == corrected(FedAvg())


def test_the_server_averages_as_fedavg_does() -> None:
    state = ServerState(3, torch.tensor([1.0, 2.0, 3.0]))
    aggregate = Aggregate(2.0, torch.tensor([4.0, 0.0, -2.0]), {}, 2)
    ours, theirs = FedProx(mu=9.0, lr=0.5).apply(state, aggregate), FedAvg(lr=0.5).apply(state, aggregate)
    assert ours.params.tolist() == theirs.params.tolist() == [2, 2, 2.5]
    assert ours.round == 4


@pytest.mark.parametrize("mu", [-0.1, math.nan])
def test_a_mu_that_pushes_away_is_refused(mu: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.mu"):
        FedProx(mu=mu)


def test_the_server_learning_rate_is_checked_as_in_fedavg() -> None:
    with pytest.raises(ValueError, match=r"strategy\.lr"):
        FedProx(lr=0.0)
