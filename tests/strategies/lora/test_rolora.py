import torch

from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Update
from strategies.lora.frozen_half import RoLora

LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (1, 2), (2, 1)), scale=2.0)
CLIENTS = [
    Update(0, 1.0, torch.tensor([1.0, 2, 4, 1, 2])),
    Update(1, 0.5, torch.tensor([4.0, -1, 1, 4, -1])),
]


def start(strategy: RoLora) -> ServerState:
    return strategy.init(torch.tensor([1.0, 3, 4, 0, 0]), LAYOUT)


def a_round(strategy: RoLora, state: ServerState) -> ServerState:
    sent = [strategy.finish(update, strategy.broadcast(state), {})[0] for update in CLIENTS]
    total = sum((update.weight * update.delta for update in sent), torch.zeros(5))
    return strategy.apply(state, Aggregate(sum(update.weight for update in sent), total, {}, 2))


def test_rounds_move_b_and_a_in_turn() -> None:
    # norm: (1 + 0.5 * 4) / 1.5 = 2;  A: (2 - 0.5) / 1.5 = 1, (4 + 0.5) / 1.5 = 3;
    # B: (1 + 0.5 * 4) / 1.5 = 2, (2 - 0.5) / 1.5 = 1
    strategy = RoLora()
    first = a_round(strategy, start(strategy))
    assert first.params.tolist() == [3, 3, 4, 2, 1]
    second = a_round(strategy, first)
    assert second.params.tolist() == [5, 4, 7, 2, 1]
    assert a_round(strategy, second).params.tolist() == [7, 4, 7, 4, 2]


def test_the_frozen_half_has_no_gradient_and_is_not_sent_up() -> None:
    strategy = RoLora()
    state = start(strategy)
    for expected in ([[1, 0, 0, 1, 1]], [[1, 1, 1, 0, 0]]):
        grad = torch.ones(1, 5)
        strategy.correct(grad, torch.ones(1, 5), strategy.broadcast(state), {})
        assert grad.tolist() == expected
        assert strategy.floats(strategy.broadcast(state)) == (5, 3)
        state = a_round(strategy, state)


def test_the_server_steps_by_its_learning_rate() -> None:
    strategy = RoLora(lr=0.5)
    assert a_round(strategy, start(strategy)).params.tolist() == [2, 3, 4, 1, 0.5]
