import numpy as np
import pytest
import torch

from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Update
from strategies.robust.rules import Rfa

LAYOUT = Layout(("w",), ((3,),))
ON_A_LINE = [torch.tensor([x, 0.0, 0.0]) for x in (1.0, 2.0, 4.0)]


def a_round(strategy: Rfa, deltas: list[torch.Tensor], weights: list[float]) -> ServerState:
    """`total` and `weight` are left wrong: the rule must not read them."""
    state = strategy.init(torch.zeros(3), LAYOUT)
    broadcast = strategy.broadcast(state)
    updates = zip(deltas, weights, strict=True)
    sent = tuple(strategy.finish(Update(k, w, x), broadcast, {})[0] for k, (x, w) in enumerate(updates))
    return strategy.apply(state, Aggregate(99.0, torch.full((3,), 99.0), {}, len(sent), sent))


def first(strategy: Rfa, weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> float:
    return a_round(strategy, ON_A_LINE, list(weights)).params[0].item()


def test_one_pass_from_the_servers_model() -> None:
    # |x| = 1, 2, 4: b = 1, 1/2, 1/4; (1 + 1 + 1) / 1.75 = 12/7
    assert first(Rfa(passes=1)) == pytest.approx(12 / 7)
    # |(3, 4, 0)| = 5, |(0, 0, 10)| = 10: b = 0.2, 0.1; ([0.6, 0.8, 0] + [0, 0, 1]) / 0.3
    params = a_round(Rfa(passes=1), [torch.tensor([3.0, 4, 0]), torch.tensor([0.0, 0, 10])], [1.0, 1.0]).params
    torch.testing.assert_close(params, torch.tensor([2.0, 8 / 3, 10 / 3]))


def test_a_second_pass() -> None:
    # z = 12/7: |x - z| = 5/7, 2/7, 16/7; b as 1/5 : 1/2 : 1/16 = 16 : 40 : 5; (16 + 80 + 20) / 61
    assert first(Rfa(passes=2)) == pytest.approx(116 / 61)


def test_clients_weights_count_unless_uniform() -> None:
    # b = 1, 1/2, 1/8: (1 + 1 + 0.5) / 1.625
    assert first(Rfa(passes=1), (1.0, 1.0, 0.5)) == pytest.approx(2.5 / 1.625)
    assert first(Rfa(passes=1, weighting="uniform"), (1.0, 1.0, 0.5)) == pytest.approx(12 / 7)
    # only their ratios matter, also under nu
    assert first(Rfa(passes=2), (10.0, 10.0, 5.0)) == pytest.approx(first(Rfa(passes=2), (1.0, 1.0, 0.5)))


def test_nu_is_the_smallest_distance() -> None:
    # b = 1/2, 1/2, 1/4: (0.5 + 1 + 1) / 1.25
    assert first(Rfa(passes=1, nu=2.0)) == pytest.approx(2)


def test_the_server_steps_by_its_learning_rate() -> None:
    assert first(Rfa(passes=1, lr=0.5)) == pytest.approx(6 / 7)


def test_no_change_is_no_change() -> None:
    assert a_round(Rfa(), [torch.zeros(3)] * 4, [1.0] * 4).params.tolist() == [0, 0, 0]


def test_many_passes_reach_the_geometric_median() -> None:
    random = np.random.default_rng(3)
    points = [torch.from_numpy(random.standard_normal(3).astype(np.float32)) for _ in range(7)]
    weights = [1.0, 0.5, 0.25, 1.0, 0.75, 0.5, 1.0]
    median = a_round(Rfa(passes=200), points, weights).params

    def cost(z: torch.Tensor) -> float:
        return sum(w * (x.double() - z).norm().item() for x, w in zip(points, weights, strict=True))

    for _ in range(50):
        step = torch.from_numpy(random.standard_normal(3))
        assert cost(median) < cost(median + 0.01 * step / step.norm())


def test_each_pass_is_sent_and_received() -> None:
    broadcast = Rfa().broadcast(Rfa().init(torch.zeros(3), LAYOUT))
    assert Rfa(passes=1).floats(broadcast) == (3, 3)
    assert Rfa(passes=4).floats(broadcast) == (12, 12)
