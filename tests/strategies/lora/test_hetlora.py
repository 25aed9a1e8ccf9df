import math
from dataclasses import replace

import pytest
import torch

from strategies.core.layout import Layout
from strategies.core.lora_algebra import products
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, ServerState, Update
from strategies.lora.hetlora import HetLora, norm_of_products

# alpha = 1 * 2: a client of rank 1 has the scale 2.
LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (2, 2), (2, 2)), scale=1.0)
PARAMS = torch.tensor([0.0, 1, 2, 3, 4, 1, 0, 0, 2])
ENDS = [  # norm, A, B of a client of rank 2 and of one of rank 1, with their ranks and weights by examples
    (2, 1.0, torch.tensor([4.0, 1, 0, 0, 1, 3, 0, 0, 4])),
    (1, 0.25, torch.tensor([8.0, 1, 0, 0, 0, 0, 0, 7.5, 0])),
]


def a_round(strategy: HetLora) -> ServerState:
    state = strategy.init(PARAMS, LAYOUT)
    sent = []
    for client, (lora_rank, weight, end) in enumerate(ENDS):
        broadcast = replace(strategy.broadcast(state), lora_rank=lora_rank)
        sent.append(strategy.finish(Update(client, weight, end - broadcast.params), broadcast, {})[0])
    total = sum((update.weight * update.delta for update in sent), torch.zeros(9))
    return strategy.apply(state, Aggregate(sum(update.weight for update in sent), total, {}, 2))


def test_the_norm_of_the_product_is_the_weight() -> None:
    # |diag(3, 4)| = 5;  2 * [0, 7.5]' [1, 0] has the norm 15: weights 1/4 and 3/4, B of the second counts twice.
    # norm: (4 + 3 * 8) / 4 = 7;  A: [[1, 0], [0, 1/4]];  B: [[3/4, 0], [3/4 * 15, 1]]
    state = a_round(HetLora(gamma=1.0))
    torch.testing.assert_close(state.params, torch.tensor([7.0, 1, 0, 0, 0.25, 0.75, 0, 11.25, 1]))


def test_the_norm_needs_no_product() -> None:
    layout = Layout(LAYOUT.names[1:], ((3, 5), (4, 3)), scale=1.5)
    vector = torch.randn(27, generator=torch.Generator().manual_seed(0))
    assert norm_of_products(vector, layout) == pytest.approx(float(products(vector, layout).norm()), rel=1e-5)


def test_other_weights() -> None:
    # 0.8 and 0.2: norm 4.8, A: [[1, 0], [0, .8]], B: [[2.4, 0], [3, 3.2]];  1/2 each: norm 6, and so on
    by_examples = a_round(HetLora(gamma=1.0, weighting="examples"))
    torch.testing.assert_close(by_examples.params, torch.tensor([4.8, 1, 0, 0, 0.8, 2.4, 0, 3, 3.2]))
    uniform = a_round(HetLora(gamma=1.0, weighting="uniform"))
    torch.testing.assert_close(uniform.params, torch.tensor([6.0, 1, 0, 0, 0.5, 1.5, 0, 7.5, 2]))


def test_the_server_steps_by_its_learning_rate() -> None:
    half = a_round(HetLora(gamma=1.0, lr=0.5)).params
    torch.testing.assert_close(half, (PARAMS + a_round(HetLora(gamma=1.0)).params) / 2)


def test_a_client_gets_its_first_ranks_under_its_scale() -> None:
    broadcast = replace(HetLora().broadcast(HetLora().init(PARAMS, LAYOUT)), lora_rank=1)
    assert HetLora().starts(broadcast, {})[GLOBAL].tolist() == [0, 1, 2, 0, 0, 0.5, 0, 0, 0]
    assert HetLora().starts(replace(broadcast, lora_rank=None), {})[GLOBAL].tolist() == PARAMS.tolist()


def finished(strategy: HetLora, end: list[float], client_state: ClientState) -> tuple[Update, ClientState]:
    broadcast = Broadcast(0, PARAMS, layout=LAYOUT)
    return strategy.finish(Update(0, 1.0, torch.tensor(end) - PARAMS), broadcast, client_state)


def test_a_tail_that_shrank_is_pruned_for_good() -> None:
    # The tail at the start: |[3, 4]| |[0, 2]| = 10, at the end: |[0, 3]| |[2, 0]| = 6, so the rank goes to 1.
    strategy = HetLora(gamma=0.5)
    end = [0.0, 5, 6, 0, 3, 7, 2, 8, 0]
    sent, client_state = finished(strategy, end, {})
    assert client_state["rank"].tolist() == [1]
    torch.testing.assert_close(sent.delta + PARAMS, torch.tensor([0.0, 5, 6, 0, 0, 7, 0, 8, 0]))
    assert sent.weight == pytest.approx(math.sqrt((25 + 36) * (49 + 64)))  # |A_1| |B_1|
    start = strategy.starts(Broadcast(1, PARAMS, layout=LAYOUT), client_state)[GLOBAL]
    assert start.tolist() == [0, 1, 2, 0, 0, 1, 0, 0, 0]  # cut to rank 1, under the scale that it was given
    # A rank of one has no tail left.
    assert finished(strategy, end, client_state)[1]["rank"].tolist() == [1]


def test_a_tail_that_grew_stays_and_gamma_says_where_it_begins() -> None:
    grown = [0.0, 5, 6, 3, 4, 7, 3, 8, 0]  # 5 * 3 > 10
    assert finished(HetLora(gamma=0.5), grown, {})[1]["rank"].tolist() == [2]
    shrunk = [0.0, 5, 6, 0, 3, 7, 2, 8, 0]
    assert finished(HetLora(gamma=0.99), shrunk, {})[1]["rank"].tolist() == [1]  # floor(1.98) = 1
    assert finished(HetLora(gamma=1.0), shrunk, {})[1]["rank"].tolist() == [2]


def test_the_penalty_pulls_on_the_tail_alone() -> None:
    # A_tail = [3, 4] of norm 5, B_tail = [0, 2]' of norm 2: 0.5 * 2 * [3, 4] / 5 and 0.5 * 5 * [0, 1]'
    strategy, broadcast = HetLora(gamma=0.5, penalty=0.5), Broadcast(0, PARAMS, layout=LAYOUT)
    grad_KP = torch.zeros(2, 9)
    strategy.correct(grad_KP, torch.stack([PARAMS, torch.zeros(9)]), broadcast, {})
    torch.testing.assert_close(grad_KP, torch.tensor([[0.0, 0, 0, 0.6, 0.8, 0, 0, 0, 2.5], [0.0] * 9]))
    pruned = torch.zeros(2, 9)  # in this pack the first client has no tail any more
    client_state = {"rank": torch.tensor([[1.0], [2.0]])}
    strategy.correct(pruned, torch.stack([PARAMS, PARAMS]), broadcast, client_state)
    torch.testing.assert_close(pruned, torch.stack([torch.zeros(9), grad_KP[0]]))
    none = torch.zeros(1, 9)
    HetLora(gamma=0.5, penalty=0.0).correct(none, PARAMS[None], broadcast, {})
    assert not none.any()


def test_the_penalty_is_the_gradient_of_what_is_added_to_the_loss() -> None:
    strategy, broadcast = HetLora(gamma=0.5, penalty=0.3), Broadcast(0, PARAMS, layout=LAYOUT)
    params = torch.randn(9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (pair,) = LAYOUT.lora_pairs(params)
    (0.3 * pair.a_RI[1:].norm() * pair.b_OR[:, 1:].norm()).backward()
    grad = torch.zeros(1, 9)
    strategy.correct(grad, params.detach()[None], broadcast, {})
    assert params.grad is not None
    torch.testing.assert_close(grad[0], params.grad)


def test_untrained_clients_have_no_weight_and_move_nothing() -> None:
    untrained = torch.tensor([0.0, 1, 2, 3, 4, 0, 0, 0, 0])
    strategy = HetLora()
    state = strategy.init(untrained, LAYOUT)
    sent, _ = strategy.finish(Update(0, 1.0, torch.zeros(9)), strategy.broadcast(state), {})
    assert sent.weight == 0
    after = strategy.apply(state, Aggregate(0.0, torch.zeros(9), {}, 1))
    assert torch.equal(after.params, untrained)
    assert after.round == 1


def test_traffic_is_by_rank() -> None:
    broadcast = Broadcast(0, PARAMS, layout=LAYOUT)
    assert HetLora().floats(broadcast) == (9, 9)
    assert HetLora().floats(replace(broadcast, lora_rank=1)) == (5, 5)


@pytest.mark.parametrize("gamma", [0.0, 1.1, -0.5, math.nan])
def test_a_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.gamma is .* must be above 0 and at most 1, not"):
        HetLora(gamma=gamma)


@pytest.mark.parametrize("penalty", [-0.1, math.nan, math.inf])
def test_a_penalty_that_feeds_the_tail_is_refused(penalty: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.penalty .* must be at least 0, not"):
        HetLora(penalty=penalty)
