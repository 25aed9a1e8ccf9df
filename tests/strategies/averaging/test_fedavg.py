import math

import pytest
import torch

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Update

LAYOUT = Layout(("w",), ((3,),))
CLIENTS = [
    Update(0, 1.0, torch.tensor([1.0, 2.0, -4.0])),
    Update(1, 0.25, torch.tensor([-1.0, 2.0, 8.0])),
]


def a_round(strategy: FedAvg) -> ServerState:
    state = strategy.init(torch.tensor([10.0, 20.0, 30.0]), LAYOUT)
    broadcast = strategy.broadcast(state)
    sent = [strategy.finish(update, broadcast, {})[0] for update in CLIENTS]
    total = sum((update.weight * update.delta for update in sent), torch.zeros(3))
    return strategy.apply(state, Aggregate(sum(update.weight for update in sent), total, {}, len(sent)))


def test_a_round_weighted_by_examples() -> None:
    # (1 * [1, 2, -4] + 0.25 * [-1, 2, 8]) / 1.25 = [0.75, 2.5, -2] / 1.25 = [0.6, 2, -1.6]
    state = a_round(FedAvg())
    torch.testing.assert_close(state.params, torch.tensor([10.6, 22.0, 28.4]))
    assert (state.round, state.moments, state.merged_delta) == (1, {}, None)


def test_a_round_weighted_uniformly() -> None:
    # ([1, 2, -4] + [-1, 2, 8]) / 2 = [0, 2, 2]
    assert a_round(FedAvg(weighting="uniform")).params.tolist() == [10, 22, 32]


def test_the_server_steps_by_its_learning_rate() -> None:
    assert a_round(FedAvg(lr=0.5, weighting="uniform")).params.tolist() == [10, 21, 31]
    assert a_round(FedAvg(lr=2.0, weighting="uniform")).params.tolist() == [10, 24, 34]


def test_the_plain_gradient_is_left_alone() -> None:
    strategy = FedAvg()
    broadcast = strategy.broadcast(strategy.init(torch.zeros(3), LAYOUT))
    grad = torch.tensor([[1.0, 2.0, 3.0]])
    strategy.correct(grad, torch.ones(1, 3), broadcast, {})
    assert grad.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan])
def test_a_learning_rate_that_goes_nowhere_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.lr"):
        FedAvg(lr=lr)
