"""What the engine does with a strategy, less models and Ray: rounds on small vectors, and on quadratic clients."""

from dataclasses import replace

import pytest
import torch

from engine.aggregation.exact_sum import ExactSum, merge
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Update


@pytest.fixture(scope="session")
def first_state():
    """The state before the first round at theta = (10, 20, 30), with a population of four."""

    def make(strategy, params=(10.0, 20.0, 30.0)):
        return replace(strategy.init(torch.tensor(params), Layout(("w",), ((len(params),),))), population=4)

    return make


@pytest.fixture(scope="session")
def play_round():
    """Plays a round of clients' updates; returns the next state, what was sent, and all client_states after it."""

    def play(strategy, state, updates, client_states=None):
        broadcast, client_states, sent, running = strategy.broadcast(state), dict(client_states or {}), [], ExactSum()
        for update in updates:
            update, client_states[update.client] = strategy.finish(
                update, broadcast, client_states.get(update.client, {})
            )
            sent.append(update)
            running.add(update)
        return strategy.apply(state, merge([running.take()])), sent, client_states

    return play


@pytest.fixture(scope="session")
def solve_quadratics(first_state, play_round):
    """Trains four clients with losses (a_k / 2) (x - b_k)^2 by gradient descent to where the strategy ends; gives x."""

    def solve(strategy, curvatures, optima, rounds, steps=5, lr=0.1):
        state, client_states = first_state(strategy, (0.0,)), {}
        for _ in range(rounds):
            broadcast, updates = strategy.broadcast(state), []
            for client, (a, b) in enumerate(zip(curvatures, optima, strict=True)):
                client_state = client_states.get(client, {})
                x_KP = strategy.starts(broadcast, client_state)[GLOBAL][None].clone()
                for _ in range(steps):
                    grad_KP = a * (x_KP - b)
                    strategy.correct(grad_KP, x_KP, broadcast, client_state)
                    x_KP = x_KP - lr * grad_KP
                metrics = {"steps": float(steps), "rates": steps * lr}
                updates.append(Update(client, 1.0, x_KP[0] - broadcast.params, metrics=metrics))
            state, _, client_states = play_round(strategy, state, updates, client_states)
        return state.params.item()

    return solve
