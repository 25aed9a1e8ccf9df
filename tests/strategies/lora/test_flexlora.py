"""Legend: R rank, I inputs and O outputs of a layer."""

from dataclasses import replace

import pytest
import torch

from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ServerState, Update
from strategies.lora.products import FlexLora

# alpha = 2 * 2: a client of rank 1 has the scale 4.
LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (2, 2), (2, 2)), scale=2.0)
ENDS = [(2, torch.tensor([1.0, 1, 0, 0, 1, 0, 5, 2, 0])), (1, torch.tensor([3.0, 0, 1, 0, 0, 1.5, 0, 0, 0]))]
BOTH = pytest.mark.parametrize("sketch", [0, 2])


def a_round(strategy: FlexLora) -> ServerState:
    state = strategy.init(torch.zeros(9), LAYOUT)
    sent = []
    for client, (lora_rank, end) in enumerate(ENDS):
        broadcast = replace(strategy.broadcast(state), lora_rank=lora_rank)
        sent.append(strategy.finish(Update(client, 0.5, end - broadcast.params), broadcast, {})[0])
    total = sum((update.weight * update.delta for update in sent), torch.zeros(9))
    extras = {name: sent[0].extras[name] + sent[1].extras[name] for name in sent[0].extras}
    return strategy.apply(state, Aggregate(1.0, total, extras, 2))


@BOTH
def test_the_mean_product_is_given_out_by_its_svd(sketch: int) -> None:
    # 2 [[0, 5], [2, 0]] @ I = [[0, 10], [4, 0]];  4 [1.5, 0]' [0, 1] = [[0, 6], [0, 0]];  mean [[0, 8], [2, 0]]
    # S = 8, 2: B = U S / 2 = [[4, 0], [0, 1]], A = V' = [[0, 1], [1, 0]], signs aside; norm: (1 + 3) / 2 = 2
    state = a_round(FlexLora(sketch=sketch))
    torch.testing.assert_close(state.params.abs(), torch.tensor([2.0, 0, 1, 1, 0, 4, 0, 0, 1]), rtol=0, atol=1e-5)
    (pair,) = LAYOUT.lora_pairs(state.params)
    product_OI = pair.scale * pair.b_OR @ pair.a_RI
    torch.testing.assert_close(product_OI, torch.tensor([[0.0, 8], [2, 0]]), rtol=0, atol=1e-5)


@BOTH
def test_a_client_of_rank_one_gets_the_largest_direction_under_its_scale(sketch: int) -> None:
    # 4 * B A must be [[0, 8], [0, 0]]: B = [2, 0]', A = [0, 1]
    strategy = FlexLora(sketch=sketch)
    broadcast = replace(strategy.broadcast(a_round(strategy)), lora_rank=1)
    start = strategy.starts(broadcast, {})[GLOBAL]
    torch.testing.assert_close(start.abs(), torch.tensor([2.0, 0, 1, 0, 0, 2, 0, 0, 0]), rtol=0, atol=1e-5)


@BOTH
def test_half_a_server_step_goes_half_the_way(sketch: int) -> None:
    state = a_round(FlexLora(lr=0.5, sketch=sketch))
    torch.testing.assert_close(state.params.abs(), torch.tensor([1.0, 0, 1, 1, 0, 2, 0, 0, 0.5]), rtol=0, atol=1e-5)


def test_the_adapters_themselves_do_not_reach_the_server() -> None:
    for strategy in (FlexLora(), FlexLora(sketch=1)):
        broadcast = strategy.broadcast(strategy.init(torch.zeros(9), LAYOUT))
        sent, _ = strategy.finish(Update(0, 1.0, torch.ones(9)), broadcast, {})
        assert sent.delta.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]
        assert set(sent.extras) == ({"range", "core"} if strategy.sketch else {"product"})


WIDE = Layout(LAYOUT.names[1:], ((2, 30), (20, 2)))


def product_from(strategy: FlexLora, clients: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product that the server finds at rank 2, and the clients' mean product, of twice as many ranks as clients."""
    draw = torch.Generator().manual_seed(0)
    state = replace(strategy.init(torch.zeros(100), WIDE), seed=5)
    extras: dict[str, torch.Tensor] = {}
    mean_OI = torch.zeros(20, 30)
    for client in range(clients):
        end = torch.randn(100, generator=draw)
        (pair,) = WIDE.lora_pairs(end)
        mean_OI += pair.b_OR @ pair.a_RI / clients
        sent, _ = strategy.finish(Update(client, 1.0, end), strategy.broadcast(state), {})
        extras = {name: extras.get(name, 0) + extra for name, extra in sent.extras.items()}
    after = strategy.apply(state, Aggregate(float(clients), torch.zeros(100), extras, clients))
    (pair,) = WIDE.lora_pairs(after.params)
    return pair.b_OR @ pair.a_RI, mean_OI


@pytest.mark.parametrize("sketch", [0, 1, 3])
def test_where_the_rank_suffices_nothing_is_lost(sketch: int) -> None:
    product, mean = product_from(FlexLora(sketch=sketch), clients=1)
    torch.testing.assert_close(product, mean, rtol=0, atol=1e-4)


def test_the_dense_rule_is_the_best_approximation_and_a_wider_sketch_comes_nearer() -> None:
    dense, mean = product_from(FlexLora(), clients=4)
    beyond = torch.linalg.svdvals(mean)[2:]
    assert float((dense - mean).norm()) == pytest.approx(float(beyond.norm()), rel=1e-4)
    narrow, some, enough = (product_from(FlexLora(sketch=sketch), clients=4)[0] for sketch in (1, 4, 6))
    distances = [float((product - dense).norm()) for product in (narrow, some, enough)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-3 < distances[1]


def test_sketches_are_what_is_sent() -> None:
    broadcast = Broadcast(0, torch.zeros(100), layout=WIDE)
    assert FlexLora().floats(broadcast) == (100, 100)
    assert FlexLora().floats(replace(broadcast, lora_rank=1)) == (50, 50)
    # S = 2 + 3, L = 11: 20 * 5 + 11 * 30
    assert FlexLora(sketch=3).floats(broadcast) == (100, 430)


def test_each_round_draws_by_the_seed() -> None:
    strategy = FlexLora(sketch=2)
    state = strategy.init(torch.zeros(100), WIDE)
    drawn = strategy.broadcast(state).extras
    assert torch.equal(drawn["columns"], strategy.broadcast(state).extras["columns"])
    for other in (replace(state, round=1), replace(state, seed=1)):
        assert not torch.equal(drawn["rows"], strategy.broadcast(other).extras["rows"])
    assert strategy.broadcast(state).params is state.params
    assert FlexLora().broadcast(state).extras == {}


def test_a_negative_sketch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy\.sketch is .* must be at least 0, not -1"):
        FlexLora(sketch=-1)
