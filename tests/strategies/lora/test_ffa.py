import math
from dataclasses import replace

import pytest
import torch

from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Update
from strategies.lora.frozen_half import FfaLora

LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (1, 2), (2, 1)), scale=2.0)
CLIENTS = [
    Update(0, 1.0, torch.tensor([1.0, 9, 9, 1, 2])),
    Update(1, 0.5, torch.tensor([4.0, 9, 9, 4, -1])),
]


def a_round(strategy: FfaLora, state: ServerState) -> ServerState:
    sent = [strategy.finish(update, strategy.broadcast(state), {})[0] for update in CLIENTS]
    total = sum((update.weight * update.delta for update in sent), torch.zeros(5))
    return strategy.apply(state, Aggregate(sum(update.weight for update in sent), total, {}, 2))


def start(strategy: FfaLora) -> ServerState:
    return strategy.init(torch.tensor([1.0, 3, 4, 0, 2]), LAYOUT)


def test_a_stays_and_the_rest_is_averaged() -> None:
    # norm: (1 + 0.5 * 4) / 1.5 = 2;  B: (1 + 0.5 * 4) / 1.5 = 2, (2 - 0.5 * 1) / 1.5 = 1;  A sends nothing
    strategy = FfaLora()
    state = a_round(strategy, start(strategy))
    assert state.params.tolist() == [3, 3, 4, 2, 3]
    assert a_round(strategy, state).params.tolist() == [5, 3, 4, 4, 4]
    assert (state.round, state.moments, state.merged_delta) == (1, {}, None)


def test_the_settings_of_fedavg_hold() -> None:
    half, uniform = FfaLora(lr=0.5), FfaLora(weighting="uniform")
    assert a_round(half, start(half)).params.tolist() == [2, 3, 4, 1, 2.5]
    # (1 + 4) / 2 = 2.5;  (1 + 4) / 2 = 2.5;  (2 - 1) / 2 = 0.5
    assert a_round(uniform, start(uniform)).params.tolist() == [3.5, 3, 4, 2.5, 2.5]
    with pytest.raises(ValueError, match=r"strategy\.lr"):
        FfaLora(lr=math.nan)


def test_a_has_no_gradient() -> None:
    strategy = FfaLora()
    grad_KP = torch.tensor([[5.0, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
    strategy.correct(grad_KP, torch.ones(2, 5), strategy.broadcast(start(strategy)), {})
    assert grad_KP.tolist() == [[5, 0, 0, 8, 9], [1, 0, 0, 4, 5]]


def test_a_does_not_travel() -> None:
    strategy = FfaLora()
    assert strategy.floats(strategy.broadcast(start(strategy))) == (3, 3)
    assert strategy.floats(replace(strategy.broadcast(start(strategy)), round=9)) == (3, 3)
