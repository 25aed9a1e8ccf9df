import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import Update
from strategies.robust.rules import CenteredClipping

FIRST = [Update(0, 1.0, torch.tensor([3.0, 4.0, 0.0])), Update(1, 0.25, torch.tensor([0.0, 0.0, 10.0]))]
SECOND = [Update(0, 1.0, torch.tensor([1.5, 2.0, 14.5])), Update(1, 0.25, torch.tensor([1.5, 2.0, 2.5]))]


def test_two_rounds(first_state: Any, play_round: Any) -> None:
    strategy = CenteredClipping(tau=5.0)
    state, sent, _ = play_round(strategy, first_state(strategy), FIRST)
    # around 0: |[3, 4, 0]| = 5 stays, |[0, 0, 10]| = 10 is halved; v = ([3, 4, 0] + [0, 0, 5]) / 2
    assert [update.delta.tolist() for update in sent] == [[3, 4, 0], [0, 0, 5]]
    assert state.moments["v"].tolist() == [1.5, 2, 2.5]
    assert state.params.tolist() == [11.5, 22, 32.5]
    # around v: [0, 0, 12] becomes [0, 0, 5], the second client is at v; v += [0, 0, 2.5]
    state, sent, _ = play_round(strategy, state, SECOND)
    assert [update.delta.tolist() for update in sent] == [[0, 0, 5], [0, 0, 0]]
    assert state.moments["v"].tolist() == [1.5, 2, 5]
    assert state.params.tolist() == [13, 24, 37.5]


def test_tau_and_the_server_learning_rate_count(first_state: Any, play_round: Any) -> None:
    # [3, 4, 0] / 2 and [0, 0, 10] / 4: v = [0.75, 1, 1.25]; half of it
    strategy = CenteredClipping(tau=2.5, lr=0.5)
    assert play_round(strategy, first_state(strategy), FIRST)[0].params.tolist() == [10.375, 20.5, 30.625]


def test_a_tau_beyond_all_changes_is_fedavg(first_state: Any, play_round: Any) -> None:
    ours, theirs = CenteredClipping(tau=1e6), FedAvg(weighting="uniform")
    state, other = first_state(ours), first_state(theirs)
    for updates in (FIRST, SECOND):
        state, other = play_round(ours, state, updates)[0], play_round(theirs, other, updates)[0]
    torch.testing.assert_close(state.params, other.params)


@settings(deadline=None)
@given(st.tuples(*[st.floats(-1000, 1000, width=32)] * 3), st.floats(0.25, 4, width=32))
def test_one_client_moves_v_by_no_more_than_its_share_of_tau(
    first_state: Any, play_round: Any, delta: tuple[float, ...], tau: float
) -> None:
    strategy = CenteredClipping(tau=tau)
    honest = [Update(k, 1.0, torch.full((3,), 0.125 * k)) for k in range(3)]
    state = play_round(strategy, first_state(strategy), honest)[0]
    silent = Update(3, 1.0, state.moments["v"])  # at v itself it adds nothing
    with_it, without = (
        play_round(strategy, state, [*honest, last])[0].moments["v"]
        for last in (Update(3, 1.0, torch.tensor(delta)), silent)
    )
    assert (with_it - without).norm() <= tau / 4 * (1 + 1e-4)


def test_v_travels_down_beside_the_model(first_state: Any) -> None:
    assert CenteredClipping().floats(CenteredClipping().broadcast(first_state(CenteredClipping()))) == (6, 3)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_a_tau_that_clips_to_nothing_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.tau .* must be a number above 0, not"):
        CenteredClipping(tau=tau)
