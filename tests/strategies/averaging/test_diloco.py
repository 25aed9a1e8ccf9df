import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.fedavg import FedAvg
from strategies.averaging.fedopt import DiLoCo
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Update

FIRST, SECOND = [1.0, -2.0, 0.0], [0.0, 2.0, 1.0]  # the mean changes D of two rounds


def rounds(strategy: FedAvg, *means: list[float]) -> ServerState:
    """From theta = (10, 20, 30), with weights that sum to 2."""
    state = strategy.init(torch.tensor([10.0, 20.0, 30.0]), Layout(("w",), ((3,),)))
    for mean in means:
        state = strategy.apply(state, Aggregate(2.0, 2 * torch.tensor(mean), {}, 3))
    return state


def test_two_rounds() -> None:
    strategy = DiLoCo(lr=0.5, momentum=0.5)
    # m = D; theta += 0.5 (D + 0.5 m) = 0.75 D
    assert rounds(strategy, FIRST).params.tolist() == [10.75, 18.5, 30]
    # m = 0.5 [1, -2, 0] + [0, 2, 1] = [0.5, 1, 1]; theta += 0.5 ([0, 2, 1] + [0.25, 0.5, 0.5])
    state = rounds(strategy, FIRST, SECOND)
    assert state.params.tolist() == [10.875, 19.75, 30.75]
    assert state.moments["m"].tolist() == [0.5, 1, 1]


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_the_outer_step_is_torchs_nesterov_on_the_negative_change(means: list[list[float]]) -> None:
    theta = torch.tensor([10.0, 20.0, 30.0], requires_grad=True)
    sgd = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True)
    for mean in means:
        theta.grad = -torch.tensor(mean)
        sgd.step()
    torch.testing.assert_close(rounds(DiLoCo(), *means).params, theta.detach())


def test_without_momentum_it_is_fedavg() -> None:
    ours, theirs = rounds(DiLoCo(momentum=0.0), FIRST, SECOND), rounds(FedAvg(lr=0.7), FIRST, SECOND)
    torch.testing.assert_close(ours.params, theirs.params)


def test_clients_count_the_same_unless_told_otherwise() -> None:
    update, strategy = Update(0, 0.25, torch.ones(3)), DiLoCo()
    broadcast = strategy.broadcast(rounds(strategy))
    assert strategy.finish(update, broadcast, {})[0].weight == 1
    assert DiLoCo(weighting="examples").finish(update, broadcast, {})[0].weight == 0.25


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_that_does_not_fade_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.momentum .* must be at least 0 and below 1"):
        DiLoCo(momentum=momentum)
