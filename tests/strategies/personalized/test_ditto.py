import math
from typing import Any

import pytest
import torch

from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import GLOBAL, Aggregate, Update
from strategies.personalized.personal_models import PERSONAL, Ditto

OWN = torch.tensor([12.0, 20.0, 26.0])


def test_two_trainings_start_each_from_its_own_vector(first_state: Any) -> None:
    broadcast = Ditto().broadcast(first_state(Ditto()))
    starts = Ditto().starts(broadcast, {})
    assert list(starts) == [GLOBAL, PERSONAL]
    assert [start.tolist() for start in starts.values()] == [[10, 20, 30], [10, 20, 30]]
    assert Ditto().starts(broadcast, {PERSONAL: OWN})[PERSONAL].tolist() == [12, 20, 26]


def test_lambda_pulls_the_personal_training_alone(first_state: Any) -> None:
    strategy = Ditto(lam=0.5)
    broadcast = strategy.broadcast(first_state(strategy))
    gradients = {}
    for model in (GLOBAL, PERSONAL):
        grad = torch.ones(1, 3)
        strategy.correct(grad, OWN[None], broadcast, {PERSONAL: torch.zeros(3)}, model)
        gradients[model] = grad.tolist()
    # 1 + 0.5 (v - theta_t) = 1 + 0.5 [2, 0, -4]: theta_t is what was received, not what is remembered
    assert gradients == {GLOBAL: [[1, 1, 1]], PERSONAL: [[2, 1, -1]]}


def test_the_personal_model_is_remembered_and_the_global_change_sent(first_state: Any) -> None:
    strategy = Ditto()
    broadcast = strategy.broadcast(first_state(strategy))
    update = Update(0, 0.5, torch.tensor([1.0, 2.0, 3.0]))
    sent, client_state = strategy.finish(update, broadcast, {PERSONAL: torch.zeros(3)}, {PERSONAL: OWN})
    assert sent == update
    assert list(client_state) == [PERSONAL]
    personal = strategy.personal(broadcast, client_state)
    assert personal is not None and personal.tolist() == [12, 20, 26]
    assert strategy.personal(broadcast, {}) is None


def test_the_server_averages_as_fedavg_does(first_state: Any) -> None:
    state, aggregate = first_state(Ditto()), Aggregate(2.0, torch.tensor([4.0, 0.0, -2.0]), {}, 2)
    ours, theirs = Ditto(lam=9.0, lr=0.5).apply(state, aggregate), FedAvg(lr=0.5).apply(state, aggregate)
    assert ours.params.tolist() == theirs.params.tolist() == [11, 20, 29.5]


def test_the_personal_optimum_lies_between_the_clients_own_and_the_global_model(first_state: Any) -> None:
    """Minimises 1/2 (v - 0)^2 + 3/2 (v - 20)^2 in its second coordinate: v = 3 * 20 / 4."""
    strategy = Ditto(lam=3.0)
    broadcast, v_KP = strategy.broadcast(first_state(strategy)), torch.zeros(1, 3)
    for _ in range(100):
        grad = v_KP.clone()
        strategy.correct(grad, v_KP, broadcast, {}, PERSONAL)
        v_KP = v_KP - 0.1 * grad
    torch.testing.assert_close(v_KP, torch.tensor([[7.5, 15.0, 22.5]]))


@pytest.mark.parametrize("lam", [-0.1, math.inf, math.nan])
def test_a_lambda_that_pushes_away_is_refused(lam: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.lam .* must be at least 0, not"):
        Ditto(lam=lam)
