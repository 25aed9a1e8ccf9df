from typing import Any

import torch

from strategies.core.base import Rule
from strategies.core.protocol import GLOBAL, Update
from strategies.personalized.personal_models import LocalOnly

CHANGE = torch.tensor([1.0, 0.0, -2.0])


def test_each_client_goes_on_from_where_it_was(first_state: Any, play_round: Any) -> None:
    strategy = LocalOnly()
    state = first_state(strategy)
    broadcast = strategy.broadcast(state)
    assert strategy.starts(broadcast, {})[GLOBAL].tolist() == [10, 20, 30]
    assert strategy.personal(broadcast, {}) is None

    state, sent, client_states = play_round(strategy, state, [Update(0, 0.5, CHANGE)])
    assert sent[0].delta.tolist() == [0, 0, 0]
    assert state.params.tolist() == [10, 20, 30]
    broadcast = strategy.broadcast(state)
    assert strategy.starts(broadcast, client_states[0])[GLOBAL].tolist() == [11, 20, 28]

    # The engine's delta is against the global vector: from [11, 20, 28] by the same change, [2, 0, -4] in all.
    state, _, client_states = play_round(strategy, state, [Update(0, 0.5, 2 * CHANGE)], client_states)
    personal = strategy.personal(strategy.broadcast(state), client_states[0])
    assert personal is not None and personal.tolist() == [12, 20, 26]
    assert (state.round, state.params.tolist()) == (2, [10, 20, 30])


def test_the_gradient_is_the_clients_own(first_state: Any) -> None:
    strategy: Rule = LocalOnly()
    broadcast, grad = strategy.broadcast(first_state(strategy)), torch.tensor([[1.0, 2.0, 3.0]])
    strategy.correct(grad, torch.zeros(1, 3), broadcast, {"own": CHANGE})
    assert grad.tolist() == [[1, 2, 3]]


def test_nothing_travels(first_state: Any) -> None:
    assert LocalOnly().floats(LocalOnly().broadcast(first_state(LocalOnly()))) == (0, 0)
