import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.fedavg import FedAvg
from strategies.averaging.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState

FIRST, SECOND = [1.0, -2.0, 0.0], [0.0, 2.0, 1.0]  # the mean changes D of two rounds
ADAPTIVE = [FedAdagrad, FedAdam, FedYogi]


def rounds(strategy: FedAvg, *means: list[float]) -> ServerState:
    """From theta = (10, 20, 30), with weights that sum to 2."""
    state = strategy.init(torch.tensor([10.0, 20.0, 30.0]), Layout(("w",), ((3,),)))
    for mean in means:
        state = strategy.apply(state, Aggregate(2.0, 2 * torch.tensor(mean), {}, 3))
    return state


def check(state: ServerState, params: list[float], **moments: list[float]) -> None:
    torch.testing.assert_close(state.params, torch.tensor(params))
    assert state.moments.keys() == moments.keys()
    for name, moment in moments.items():
        torch.testing.assert_close(state.moments[name], torch.tensor(moment))


def test_momentum() -> None:
    strategy = FedAvgM(lr=0.1, momentum=0.5)
    # m = D; theta += 0.1 m
    check(rounds(strategy, FIRST), [10.1, 19.8, 30.0], m=[1.0, -2.0, 0.0])
    # m = 0.5 [1, -2, 0] + [0, 2, 1]; theta += 0.1 m
    check(rounds(strategy, FIRST, SECOND), [10.15, 19.9, 30.1], m=[0.5, 1.0, 1.0])


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_momentum_is_torchs_sgd_on_the_negative_change(means: list[list[float]]) -> None:
    theta = torch.tensor([10.0, 20.0, 30.0], requires_grad=True)
    sgd = torch.optim.SGD([theta], lr=0.3, momentum=0.8)
    for mean in means:
        theta.grad = -torch.tensor(mean)
        sgd.step()
    torch.testing.assert_close(rounds(FedAvgM(lr=0.3, momentum=0.8), *means).params, theta.detach())


def test_without_momentum_it_is_fedavg() -> None:
    ours, theirs = rounds(FedAvgM(lr=0.5, momentum=0.0), FIRST, SECOND), rounds(FedAvg(lr=0.5), FIRST, SECOND)
    assert torch.equal(ours.params, theirs.params)


def test_adagrad() -> None:
    strategy = FedAdagrad(lr=0.1, tau=1.0)
    # v = 1 + [1, 4, 0]; theta += 0.1 D / (sqrt v + 1) = [0.1 / 2.4142136, -0.2 / 3.2360680, 0]
    check(rounds(strategy, FIRST), [10.0414214, 19.9381966, 30.0], m=FIRST, v=[2.0, 5.0, 1.0])
    # v = [2, 5, 1] + [0, 4, 1]; theta += [0, 0.2 / 4, 0.1 / 2.4142136]
    check(rounds(strategy, FIRST, SECOND), [10.0414214, 19.9881966, 30.0414214], m=SECOND, v=[2.0, 9.0, 2.0])
    # m = 0.5 * [1, -2, 0]: half the first step
    half = rounds(FedAdagrad(lr=0.1, tau=1.0, beta1=0.5), FIRST)
    check(half, [10.0207107, 19.9690983, 30.0], m=[0.5, -1.0, 0.0], v=[2.0, 5.0, 1.0])


def test_adam() -> None:
    strategy = FedAdam(lr=0.1, beta1=0.5, beta2=0.5, tau=1.0)
    # m = 0.5 D; v = 0.5 * 1 + 0.5 * [1, 4, 0]; theta += 0.1 [0.5 / 2, -1 / (1.5811388 + 1), 0]
    check(rounds(strategy, FIRST), [10.025, 19.9612574, 30.0], m=[0.5, -1.0, 0.0], v=[1.0, 2.5, 0.5])
    # m = 0.5 [0.5, -1, 0] + 0.5 [0, 2, 1]; v = 0.5 [1, 2.5, 0.5] + 0.5 [0, 4, 1] = [0.5, 3.25, 0.75];
    # theta += 0.1 [0.25 / 1.7071068, 0.5 / 2.8027756, 0.5 / 1.8660254]
    check(
        rounds(strategy, FIRST, SECOND),
        [10.0396447, 19.9790969, 30.0267949],
        m=[0.25, 0.5, 0.5],
        v=[0.5, 3.25, 0.75],
    )


def test_yogi() -> None:
    strategy = FedYogi(lr=0.1, beta1=0.5, beta2=0.5, tau=1.0)
    # v - D^2 = 1 - [1, 4, 0], signs [0, -1, 1]; v = 1 - 0.5 [0, -4, 0]; theta += 0.1 [0.5 / 2, -1 / 2.7320508, 0]
    check(rounds(strategy, FIRST), [10.025, 19.9633975, 30.0], m=[0.5, -1.0, 0.0], v=[1.0, 3.0, 1.0])
    # D = [0.5, 1, 1]: v - D^2 = [0.75, 2, 0], signs [1, 1, 0]; v = [1 - 0.125, 3 - 0.5, 1];
    # m = 0.5 [0.5, -1, 0] + 0.5 D = [0.5, 0, 0.5]; theta += 0.1 [0.5 / (0.9354143 + 1), 0, 0.5 / 2]
    check(
        rounds(strategy, FIRST, [0.5, 1.0, 1.0]),
        [10.0508343, 19.9633975, 30.025],
        m=[0.5, 0.0, 0.5],
        v=[0.875, 2.5, 1.0],
    )


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_every_hyperparameter_counts(kind: type[FedAdam]) -> None:
    usual = rounds(kind(), FIRST, SECOND).params
    changes = [{"lr": 0.1}, {"beta1": 0.5}, {"tau": 0.1}] + [{"beta2": 0.5}] * (kind is not FedAdagrad)
    for change in changes:
        assert not torch.equal(rounds(kind(**change), FIRST, SECOND).params, usual), change


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_v_begins_at_tau_squared(kind: type[FedAdam]) -> None:
    assert rounds(kind(tau=0.5)).moments["v"].tolist() == [0.25] * 3


@pytest.mark.parametrize("kind", ADAPTIVE)
@settings(deadline=None)
@given(means=st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_v_never_falls_below_zero(kind: type[FedAdam], means: list[list[float]]) -> None:
    """The root is then always there, also for Yogi, which subtracts."""
    state = rounds(kind(), *means)
    assert (state.moments["v"] >= 0).all()
    assert state.params.isfinite().all()


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize(
    ("kind", "field"),
    [(FedAvgM, "momentum"), (FedAdagrad, "beta1"), (FedAdam, "beta1"), (FedAdam, "beta2"), (FedYogi, "beta2")],
)
def test_moments_that_do_not_fade_are_refused(kind: type[FedAvg], field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"strategy\.{field} is what a moment keeps and must be at least 0 and below"):
        kind(**{field: value})


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_a_tau_that_lets_steps_grow_is_refused(kind: type[FedAdam], tau: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.tau keeps steps finite and must be a number above 0"):
        kind(tau=tau)


@pytest.mark.parametrize("kind", [FedAvgM, *ADAPTIVE])
def test_the_server_learning_rate_is_checked_as_in_fedavg(kind: type[FedAvg]) -> None:
    with pytest.raises(ValueError, match=r"strategy\.lr"):
        kind(lr=0.0)
