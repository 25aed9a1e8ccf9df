"""Legend: R rank, I inputs and O outputs of a layer."""

import pytest
import torch

from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ServerState, Update
from strategies.core.seeds import rng
from strategies.lora.frozen_half import FedSb
from strategies.privacy.central import CentralDp
from strategies.privacy.noise import seeded_words

LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((1,), (1, 2), (2, 1)), scale=2.0)


def after_one_round(strategy: FedSb) -> ServerState:
    state = strategy.init(torch.tensor([1.0, 3, 4, 0, 0]), LAYOUT)
    sent, _ = strategy.finish(Update(0, 1.0, torch.tensor([1.0, 9, 9, 0, 2])), strategy.broadcast(state), {})
    return strategy.apply(state, Aggregate(1.0, sent.delta, {}, 1))


def test_the_first_round_finds_the_bases() -> None:
    # B A = [0, 2]' [3, 4]: B0 = [0, 1], R = 2 * 5 = 10, A0 = [.6, .8], or both bases with a minus
    state = after_one_round(FedSb())
    sign = state.params[1].sign()
    torch.testing.assert_close(state.params, torch.tensor([2.0, *(sign * torch.tensor([0.6, 0.8, 0, 10]))]))
    torch.testing.assert_close(state.moments["basis"], torch.tensor([0.0, 0, 0, 0, *sign[None]]))


def test_a_first_round_in_which_nothing_moves_finds_no_bases() -> None:
    """Its product is zero, and so would be all that tells one span from another."""
    strategy = FedSb()
    state = strategy.init(torch.tensor([1.0, 3, 4, 0, 0]), LAYOUT)
    after = strategy.apply(state, Aggregate(1.0, torch.zeros(5), {}, 1))
    assert after.round == 1 and after.moments == {} and torch.equal(after.params, state.params)
    # The clients' next round has bases all the same: B0 is drawn, the same one again and again, and R starts at zero.
    (b0,) = (pair.b_OR for pair in LAYOUT.lora_pairs(strategy.broadcast(after).extras["basis"]))
    assert b0.norm().item() == pytest.approx(1) and b0.all()
    assert torch.equal(strategy.broadcast(after).extras["basis"], strategy.broadcast(after).extras["basis"])
    later = strategy.apply(after, Aggregate(1.0, torch.tensor([0.0, 0, 0, 2, 0]), {}, 1))
    torch.testing.assert_close(later.params, state.params + torch.cat([torch.zeros(3), 2 * b0.flatten()]))
    assert torch.equal(later.moments["basis"], strategy.broadcast(after).extras["basis"])


def test_then_only_r_moves() -> None:
    strategy = FedSb()
    state = after_one_round(strategy)
    broadcast = strategy.broadcast(state)
    grad_KP = torch.tensor([[5.0, 6, 7, 8, 9], [1, 2, 3, 4, -5]])
    strategy.correct(grad_KP, torch.ones(2, 5), broadcast, {})
    torch.testing.assert_close(grad_KP, torch.tensor([[5.0, 0, 0, 0, 9], [1, 0, 0, 0, -5]]))
    sent, _ = strategy.finish(Update(0, 1.0, torch.tensor([1.0, 7, 7, 3, -4])), broadcast, {})
    sign = state.moments["basis"][4]  # B0 = [0, sign], so that B's change of [3, -4] is R's of -4 sign
    torch.testing.assert_close(sent.delta, torch.tensor([1.0, 0, 0, -4 * sign, 0]))
    after = strategy.apply(state, Aggregate(2.0, torch.tensor([0.0, 0, 0, -4 * sign, 0]), {}, 2))
    torch.testing.assert_close(after.params, state.params + torch.tensor([0.0, 0, 0, 0, -2]))
    assert torch.equal(after.moments["basis"], state.moments["basis"])


def test_the_server_steps_by_its_learning_rate() -> None:
    # B A = [0, 1]' [3, 4]: R = 5
    torch.testing.assert_close(after_one_round(FedSb(lr=0.5)).params.abs(), torch.tensor([1.5, 0.6, 0.8, 0, 5]))


def test_r_alone_travels_once_the_bases_are_there() -> None:
    strategy = FedSb()
    state = strategy.init(torch.zeros(5), LAYOUT)
    assert strategy.floats(strategy.broadcast(state)) == (3, 3)
    state = after_one_round(strategy)
    assert strategy.floats(strategy.broadcast(state)) == (5, 2)
    state = strategy.apply(state, Aggregate(1.0, torch.zeros(5), {}, 1))
    assert strategy.floats(strategy.broadcast(state)) == (2, 2)


@pytest.mark.parametrize("outputs", [4, 2])  # of the second, three columns of B0 span only two dimensions
def test_noise_enters_r_alone(outputs: int) -> None:
    layout = Layout(LAYOUT.names, ((6,), (3, 5), (outputs, 3)), scale=2.0)
    strategy, draw = FedSb(weighting="uniform"), torch.Generator().manual_seed(0)
    state = strategy.init(torch.randn(layout.size, generator=draw), layout)
    plan = CentralDp(noise_multiplier=1.0, clip=1.0, delta=0.1).plan(UniformCohort(size=2), 10, 3)
    for round_, live_in_b in enumerate([3 * outputs, 3 * min(outputs, 3), 3 * min(outputs, 3)]):
        sent_masks, broadcast = strategy.sent_masks(round_, layout), strategy.broadcast(state)
        assert int(sent_masks["delta"].sum()) == strategy.floats(broadcast)[1] == 6 + live_in_b
        still, _ = strategy.finish(Update(0, 1.0, torch.zeros(layout.size)), broadcast, {})
        words = seeded_words(rng(0, round_, -1, "noise"))
        noisy, _ = plan.decode(Aggregate(1.0, still.delta, {}, 1), 1.0, words, sent_masks)
        assert torch.equal(noisy.total != 0, sent_masks["delta"])
        after = strategy.apply(state, noisy)
        if round_:
            (old,), (new,) = layout.lora_pairs(state.params), layout.lora_pairs(after.params)
            b0_OR = layout.views(state.moments["basis"])[LAYOUT.names[2]]
            r_RR = noisy.total[21:].view(outputs, 3)[: min(outputs, 3)] / noisy.weight
            torch.testing.assert_close(new.b_OR, old.b_OR + b0_OR[:, : len(r_RR)] @ r_RR)
            torch.testing.assert_close(b0_OR @ (b0_OR.T @ new.b_OR), new.b_OR, atol=1e-5, rtol=0)
            assert torch.equal(new.a_RI, old.a_RI)
        state = after


def test_momentum_and_clipping_on_b_are_those_on_r() -> None:
    """Gradient descent on R between the bases, and on B with the projected gradient, go the same way."""
    layout = Layout(LAYOUT.names[1:], ((2, 5), (4, 2)), scale=2.0)
    draw = torch.Generator().manual_seed(1)
    b0_OR, a0_IR = (torch.linalg.qr(torch.randn(size, 2, generator=draw))[0] for size in (4, 5))
    r_RR = torch.randn(2, 2, generator=draw)
    basis = torch.cat([torch.zeros(10), b0_OR.flatten()])
    broadcast = Broadcast(3, torch.zeros(18), {"basis": basis}, layout)
    r, b = torch.nn.Parameter(r_RR.clone()), torch.nn.Parameter(b0_OR @ r_RR)
    on_r, on_b = (torch.optim.SGD([tensor], lr=0.1, momentum=0.9, weight_decay=0.01) for tensor in (r, b))
    for _ in range(10):
        g_OI = torch.randn(4, 5, generator=draw)
        r.grad = 2.0 * b0_OR.T @ g_OI @ a0_IR
        grad = torch.cat([torch.randn(10, generator=draw), (2.0 * g_OI @ a0_IR).flatten()])
        FedSb().correct(grad[None], grad[None], broadcast, {})
        b.grad = grad[10:].view(4, 2)
        norms = [torch.nn.utils.clip_grad_norm_([tensor], 1.0) for tensor in (r, b)]
        torch.testing.assert_close(*norms)
        on_r.step()
        on_b.step()
        torch.testing.assert_close(b.data, b0_OR @ r.data)
