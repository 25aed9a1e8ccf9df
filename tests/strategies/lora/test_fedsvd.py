import torch

from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate
from strategies.lora.frozen_half import FedSvd

LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (1, 2), (2, 1)), scale=2.0)
SQUARE = Layout(("q.lora_A.default.weight", "q.lora_B.default.weight"), ((2, 2), (2, 2)), scale=2.0)


def test_a_becomes_orthonormal_and_the_product_stays() -> None:
    # B' = [0, 1] + [2, 2] / 2 = [1, 2], A = [3, 4] of length 5: V' = [.6, .8], U S = 5 [1, 2], or both with a minus.
    strategy = FedSvd()
    state = strategy.init(torch.tensor([1.0, 3, 4, 0, 1]), LAYOUT)
    state = strategy.apply(state, Aggregate(2.0, torch.tensor([6.0, 0, 0, 2, 2]), {}, 2))
    sign = state.params[1].sign()
    torch.testing.assert_close(state.params, torch.tensor([4.0, *(sign * torch.tensor([0.6, 0.8, 5, 10]))]))
    # The second round: B moves by [5, 0] along the new A, whose length is 1 already.
    state = strategy.apply(state, Aggregate(1.0, torch.tensor([0.0, 0, 0, *(sign * torch.tensor([5.0, 0]))]), {}, 1))
    sign = state.params[1].sign()
    torch.testing.assert_close(state.params, torch.tensor([4.0, *(sign * torch.tensor([0.6, 0.8, 10, 10]))]))


def test_the_largest_direction_comes_first() -> None:
    # B A = [[0, 1], [7, 0]] @ I: 7 along (second output, first input), 1 along (first output, second input)
    strategy = FedSvd()
    state = strategy.init(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]), SQUARE)
    state = strategy.apply(state, Aggregate(1.0, torch.tensor([0.0, 0, 0, 0, 0, 1, 7, 0]), {}, 1))
    torch.testing.assert_close(state.params.abs(), torch.tensor([1.0, 0, 0, 1, 0, 1, 7, 0]))
    (pair,) = SQUARE.lora_pairs(state.params)
    torch.testing.assert_close(pair.b_OR @ pair.a_RI, torch.tensor([[0.0, 1], [7, 0]]))


def test_a_is_frozen_on_clients_but_comes_down() -> None:
    strategy = FedSvd()
    broadcast = strategy.broadcast(strategy.init(torch.tensor([1.0, 3, 4, 0, 1]), LAYOUT))
    grad = torch.ones(1, 5)
    strategy.correct(grad, torch.ones(1, 5), broadcast, {})
    assert grad.tolist() == [[1, 0, 0, 1, 1]]
    assert strategy.floats(broadcast) == (5, 3)


def test_the_server_steps_by_its_learning_rate() -> None:
    # B' = [0, 1] + 0.5 * [2, 2] / 2 = [.5, 1.5]; times 5
    strategy = FedSvd(lr=0.5)
    state = strategy.init(torch.tensor([1.0, 3, 4, 0, 1]), LAYOUT)
    state = strategy.apply(state, Aggregate(2.0, torch.tensor([6.0, 0, 0, 2, 2]), {}, 2))
    torch.testing.assert_close(state.params.abs(), torch.tensor([2.5, 0.6, 0.8, 2.5, 7.5]))
