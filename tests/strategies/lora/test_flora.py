from dataclasses import replace

import torch

from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, ServerState, Update
from strategies.lora.products import Flora

# alpha = 1 * 2: a client of rank 1 has the scale 2.
LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (2, 2), (2, 2)), scale=1.0)
ENDS = [  # norm, A, B of a client of rank 2 and of one of rank 1, with their ranks and weights
    (2, 1.0, torch.tensor([1.0, 1, 0, 0, 1, 1, 2, 3, 4])),
    (1, 0.5, torch.tensor([4.0, 1, 1, 0, 0, 1, 0, 2, 0])),
]


def start(strategy: Flora, seed: int = 7) -> ServerState:
    return replace(strategy.init(torch.tensor([0.0, 1, 2, 3, 4, 0, 0, 0, 0]), LAYOUT), seed=seed)


def a_round(strategy: Flora, state: ServerState) -> ServerState:
    sent = []
    for client, (lora_rank, weight, end) in enumerate(ENDS):
        broadcast = replace(strategy.broadcast(state), lora_rank=lora_rank)
        sent.append(strategy.finish(Update(client, weight, end - broadcast.params), broadcast, {})[0])
    total = sum((update.weight * update.delta for update in sent), torch.zeros(9))
    extras = {name: sent[0].extras[name] + sent[1].extras[name] for name in sent[0].extras}
    return strategy.apply(state, Aggregate(sum(update.weight for update in sent), total, extras, 2))


def residual(state: ServerState) -> torch.Tensor:
    assert state.merged_delta is not None
    return LAYOUT.products(state.merged_delta)[0]


def test_products_of_all_ranks_go_into_the_base_and_adapters_start_anew() -> None:
    # 1 * [[1, 2], [3, 4]] @ I = [[1, 2], [3, 4]];  2 * [[1], [2]] @ [[1, 1]] = [[2, 2], [4, 4]]
    # ([[1, 2], [3, 4]] + 0.5 * [[2, 2], [4, 4]]) / 1.5 = [[2, 3], [5, 6]] / 1.5;  norm: (1 + 0.5 * 4) / 1.5 = 2
    strategy = Flora()
    state = a_round(strategy, start(strategy))
    torch.testing.assert_close(residual(state), torch.tensor([[2.0, 3], [5, 6]]) / 1.5)
    assert state.params[0].item() == 2
    assert not state.params[5:].any()
    # The second round: its own products are added to what is there.
    again = a_round(strategy, state)
    torch.testing.assert_close(residual(again), 2 * torch.tensor([[2.0, 3], [5, 6]]) / 1.5)


def test_new_adapters_are_drawn_as_peft_draws_them() -> None:
    strategy = Flora()
    state = a_round(strategy, start(strategy))
    a = state.params[1:5]
    assert a.unique().numel() == 4
    assert a.abs().max().item() <= 2**-0.5  # Kaiming uniform with a = sqrt 5 and two inputs: 1 / sqrt 2
    assert torch.equal(a, a_round(strategy, start(strategy)).params[1:5])
    assert not torch.equal(a, a_round(strategy, start(strategy, seed=8)).params[1:5])
    assert not torch.equal(a, a_round(strategy, state).params[1:5])


def test_a_client_starts_at_its_own_rank() -> None:
    strategy = Flora()
    broadcast = strategy.broadcast(start(strategy))
    assert strategy.starts(broadcast, {})[GLOBAL].tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 0]
    assert strategy.starts(replace(broadcast, lora_rank=1), {})[GLOBAL].tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 0]


def test_half_a_server_step_merges_half() -> None:
    # The adapters' own product is zero at the start, so the base gets half the mean.
    strategy = Flora(lr=0.5)
    state = a_round(strategy, start(strategy))
    torch.testing.assert_close(residual(state), torch.tensor([[2.0, 3], [5, 6]]) / 3)
    assert state.params[0].item() == 1


def test_the_stack_comes_down_and_the_own_adapters_go_up() -> None:
    strategy = Flora()
    state = start(strategy)
    # The norm and a rank's 4 numbers each: nothing but the seed before the first round, then 2 clients at rank 2.
    assert strategy.floats(strategy.broadcast(state)) == (1, 9)
    broadcast = strategy.broadcast(a_round(strategy, state))
    assert strategy.floats(broadcast) == (17, 9)
    assert strategy.floats(replace(broadcast, lora_rank=1)) == (17, 5)
