import torch

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Update
from strategies.lora.products import FedExLora

LAYOUT = Layout(("q.lora_A.default.weight", "q.lora_B.default.weight"), ((1, 2), (2, 1)), scale=2.0)
ENDS = [torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.0, 1, 0, 1])]


def a_round(strategy: FedAvg, state: ServerState, ends: list[torch.Tensor]) -> ServerState:
    broadcast = strategy.broadcast(state)
    sent = [strategy.finish(Update(k, 0.5, end - broadcast.params), broadcast, {})[0] for k, end in enumerate(ends)]
    total = sum((update.weight * update.delta for update in sent), torch.zeros(4))
    extras = {name: sent[0].extras[name] + sent[1].extras[name] for name in sent[0].extras}
    return strategy.apply(state, Aggregate(1.0, total, extras, 2))


def residual(state: ServerState) -> list[list[float]]:
    assert state.merged_delta is not None
    return LAYOUT.products(state.merged_delta)[0].tolist()


def test_the_base_gets_what_the_average_lacks() -> None:
    # Products: 2 [[1, 0], [0, 0]] and 2 [[0, 0], [0, 1]], mean I. mean A = [.5, .5] = mean B', twice their product is
    # .5 ones.
    # The residual: I - .5 ones = [[.5, -.5], [-.5, .5]]
    strategy = FedExLora()
    state = a_round(strategy, strategy.init(torch.tensor([3.0, 4, 0, 0]), LAYOUT), ENDS)
    assert state.params.tolist() == [0.5, 0.5, 0.5, 0.5]
    assert residual(state) == [[0.5, -0.5], [-0.5, 0.5]]
    # The second round: one client turns to A = [1, 0], B' = [1, 0], the other stays. Products 2 [[1, 0], [0, 0]] and
    # .5 ones, mean [[1.25, .25], [.25, .25]]; mean A = [.75, .25] = mean B', 2 times their product
    # [[1.125, .375], [.375, .125]]; the difference [[.125, -.125], [-.125, .125]] comes on top.
    state = a_round(strategy, state, [ENDS[0], state.params])
    assert state.params.tolist() == [0.75, 0.25, 0.75, 0.25]
    assert residual(state) == [[0.625, -0.625], [-0.625, 0.625]]


def test_the_adapters_are_fedavgs() -> None:
    start = FedAvg().init(torch.tensor([3.0, 4, 0, 0]), LAYOUT)
    assert torch.equal(a_round(FedExLora(), start, ENDS).params, a_round(FedAvg(), start, ENDS).params)


def test_half_a_server_step() -> None:
    # From A = [3, 4], B = 0 halfway to the average: A = [1.75, 2.25], B' = [.25, .25];
    # 2 B A = [[.875, 1.125], [.875, 1.125]]; wanted: halfway from 0 to I
    strategy = FedExLora(lr=0.5)
    state = a_round(strategy, strategy.init(torch.tensor([3.0, 4, 0, 0]), LAYOUT), ENDS)
    assert state.params.tolist() == [1.75, 2.25, 0.25, 0.25]
    assert residual(state) == [[-0.375, -1.125], [-0.875, -0.625]]


def test_the_residual_goes_down_in_its_smaller_form() -> None:
    strategy = FedExLora()
    state = strategy.init(torch.zeros(4), LAYOUT)
    assert strategy.floats(strategy.broadcast(state)) == (4, 4)
    # Two clients' factors are 8 numbers, the matrix has 4.
    assert strategy.floats(strategy.broadcast(a_round(strategy, state, ENDS))) == (8, 4)
    wide = Layout(LAYOUT.names, ((1, 20), (20, 1)))
    assert (
        strategy.floats(
            strategy.broadcast(ServerState(1, torch.zeros(40), {"count": torch.tensor([2.0])}, None, wide))
        )[0]
        == 40 + 2 * 40
    )
