import torch

from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, Update
from strategies.personalized.personal_models import FedSaLora

LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (1, 2), (2, 1)), scale=2.0)
PARAMS = torch.tensor([1.0, 3, 4, 0, 0])


def test_two_rounds_of_two_clients() -> None:
    strategy = FedSaLora()
    state = strategy.init(PARAMS, LAYOUT)
    broadcast = strategy.broadcast(state)
    assert strategy.starts(broadcast, {})[GLOBAL].tolist() == [1, 3, 4, 0, 0]
    assert strategy.personal(broadcast, {}) is None
    first, first_state = strategy.finish(Update(0, 1.0, torch.tensor([1.0, 1, 2, 5, 6])), broadcast, {})
    other, memory_other = strategy.finish(Update(1, 1.0, torch.tensor([3.0, 3, 0, -5, -6])), broadcast, {})
    assert first_state["b"].tolist() == [5, 6]
    assert memory_other["b"].tolist() == [-5, -6]
    assert first.delta.tolist() == [1, 1, 2, 0, 0]
    # norm: (1 + 3) / 2 = 2;  A: (1 + 3) / 2 = 2, (2 + 0) / 2 = 1;  B is no one's business
    state = strategy.apply(state, Aggregate(2.0, first.delta + other.delta, {}, 2))
    assert state.params.tolist() == [3, 5, 5, 0, 0]

    broadcast = strategy.broadcast(state)
    start = strategy.starts(broadcast, first_state)[GLOBAL]
    assert start.tolist() == [3, 5, 5, 5, 6]
    end = start + torch.tensor([0.0, 1, -1, 1, 1])
    sent, client_state = strategy.finish(Update(0, 1.0, end - broadcast.params), broadcast, first_state)
    assert sent.delta.tolist() == [0, 1, -1, 0, 0]
    assert client_state["b"].tolist() == [6, 7]
    assert first_state["b"].tolist() == [5, 6]


def test_the_personal_vector_is_the_global_a_with_the_own_b() -> None:
    personal = FedSaLora().personal(Broadcast(4, PARAMS, layout=LAYOUT), {"b": torch.tensor([7.0, 8])})
    assert personal is not None
    assert personal.tolist() == [1, 3, 4, 7, 8]
    assert PARAMS.tolist() == [1, 3, 4, 0, 0]


def test_both_halves_are_trained_and_a_alone_travels() -> None:
    strategy, broadcast = FedSaLora(), Broadcast(0, PARAMS, layout=LAYOUT)
    grad = torch.ones(1, 5)
    strategy.correct(grad, PARAMS[None], broadcast, {})
    assert grad.tolist() == [[1, 1, 1, 1, 1]]
    assert strategy.floats(broadcast) == (3, 3)


def test_the_server_steps_by_its_learning_rate() -> None:
    strategy = FedSaLora(lr=0.5)
    state = strategy.apply(strategy.init(PARAMS, LAYOUT), Aggregate(2.0, torch.tensor([4.0, 4, 4, 0, 0]), {}, 2))
    assert state.params.tolist() == [2, 4, 5, 0, 0]
