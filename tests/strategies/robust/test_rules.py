from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ServerState, Update
from strategies.robust import rules as robust
from strategies.robust.rules import Bulyan, Krum, Median, MultiKrum, Rfa, TrimmedMean, squared_distances

DELTAS = [[1.0, 9.0, -4.0], [2.0, 0.0, 0.0], [6.0, 3.0, 100.0], [4.0, 1.0, 2.0], [-50.0, 2.0, 1.0]]
RULES = [Median(), TrimmedMean(), Krum(), MultiKrum(), Bulyan(), Rfa()]


def drawn(clients: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.standard_normal(size).astype(np.float32)) for _ in range(clients)]


def a_round(strategy: FedAvg, deltas: list[Any]) -> ServerState:
    """A round from the vector [10, 20, 30, ...]; the clients claim very different weights."""
    vectors = [torch.as_tensor(delta) for delta in deltas]
    state = strategy.init(torch.arange(1.0, len(vectors[0]) + 1) * 10, Layout(("w",), ((len(vectors[0]),),)))
    broadcast = strategy.broadcast(state)
    sent = [strategy.finish(Update(k, 1 / (k + 1), delta), broadcast, {})[0] for k, delta in enumerate(vectors)]
    total = sum((update.weight * update.delta for update in sent), torch.zeros_like(state.params))
    weight = sum(update.weight for update in sent)
    return strategy.apply(state, Aggregate(weight, total, {}, len(sent), tuple(sent)))


def test_the_median_of_an_odd_number_is_the_middle_one() -> None:
    # rising: [1, 2, 6], [0, 3, 9], [-4, 0, 100]
    state = a_round(Median(), DELTAS[:3])
    assert state.params.tolist() == [12, 23, 30]
    assert (state.round, state.moments, state.merged_delta) == (1, {}, None)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    # rising: [1, 2, 4, 6], [0, 1, 3, 9], [-4, 0, 2, 100]: (2 + 4)/2, (1 + 3)/2, (0 + 2)/2
    assert a_round(Median(), DELTAS[:4]).params.tolist() == [13, 22, 31]
    assert a_round(Median(lr=0.5), DELTAS[:4]).params.tolist() == [11.5, 21, 30.5]


def test_the_trimmed_mean_leaves_the_extremes_out() -> None:
    # rising: [-50, 1, 2, 4, 6], [0, 1, 2, 3, 9], [-4, 0, 1, 2, 100]; without one on each side 7/3, 2 and 1
    params = a_round(TrimmedMean(trim=0.2), DELTAS).params
    torch.testing.assert_close(params, torch.tensor([10 + 7 / 3, 22.0, 31.0]))
    # without two on each side the middle one
    assert a_round(TrimmedMean(trim=0.4), DELTAS).params.tolist() == [12, 22, 31]
    # with nothing cut: (-50 + 1 + 2 + 4 + 6)/5 = -7.4, 15/5 = 3, 99/5 = 19.8
    params = a_round(TrimmedMean(trim=0.0), DELTAS).params
    torch.testing.assert_close(params, torch.tensor([2.6, 23.0, 49.8]))


@pytest.mark.parametrize(
    ("trim", "came", "cut"), [(0.29, 100, 29), (0.1, 30, 3), (0.2, 9, 1), (0.49, 3, 1), (0.4999999999, 2, 0)]
)
def test_the_share_cut_is_rounded_down_but_for_floats_sake(trim: float, came: int, cut: int) -> None:
    assert TrimmedMean(trim=trim).cut(came) == cut


@given(st.floats(0.001, 0.499))
def test_the_smallest_cohort_is_the_first_that_is_cut(trim: float) -> None:
    rule = TrimmedMean(trim=trim)
    assert rule.cut(rule.smallest_cohort()) == 1
    assert rule.cut(rule.smallest_cohort() - 1) == 0


def test_the_smallest_cohorts_are_the_papers() -> None:
    assert [rule.smallest_cohort() for rule in RULES] == [1, 5, 5, 5, 7, 1]
    assert [rule.smallest_cohort() for rule in (Krum(f=3), MultiKrum(f=3), Bulyan(f=3))] == [9, 9, 15]
    assert MultiKrum(f=1, m=8).smallest_cohort() == 8
    assert TrimmedMean(trim=0.0).smallest_cohort() == FedAvg().smallest_cohort() == 1


@pytest.mark.parametrize(
    ("rule", "came", "message"),
    [
        (Krum(f=2), 6, r"'krum' as set needs the updates of at least 7 clients a round, but 6 came: .*strategy\.f = 1"),
        (Krum(f=0), 2, r"at least 3 clients a round, but 2 came: raise cohort\.size .*or take another strategy"),
        (Bulyan(f=2), 7, r"'bulyan' .*at least 11 clients a round, but 7 came: .*set strategy\.f = 1"),
        (MultiKrum(m=6), 5, r"'multi_krum' .*at least 6 .*but 5 came: .*set strategy\.m to at most 5"),
        (MultiKrum(m=6), 4, r"at least 6 .*but 4 came: .*or take another strategy"),
        (TrimmedMean(), 4, r"'trimmed_mean' .*at least 5 .*but 4 came: .*set strategy\.trim to at least 1/4"),
    ],
)
def test_too_few_updates_are_refused_with_a_way_out(rule: FedAvg, came: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_round(rule, drawn(came, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(trim=0.5), r"strategy\.trim .* not 0\.5"),
        (lambda: TrimmedMean(trim=-0.1), r"strategy\.trim"),
        (lambda: Krum(f=-1), r"strategy\.f .* not -1"),
        (lambda: Bulyan(f=-1), r"strategy\.f"),
        (lambda: MultiKrum(m=0), r"strategy\.m .* not 0"),
        (lambda: Rfa(passes=0), r"strategy\.passes .* not 0"),
        (lambda: Rfa(nu=0.0), r"strategy\.nu .* not 0\.0"),
        (lambda: Median(lr=0.0), r"strategy\.lr"),
    ],
)
def test_bad_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_one_liar_does_not_carry_the_model_away(rule: FedAvg) -> None:
    honest = drawn(8, 50)
    state = a_round(rule, [*honest, torch.full((50,), 1e30)])
    change = state.params - torch.arange(1.0, 51) * 10
    assert change.norm() < 2 * max(delta.norm() for delta in honest)
    mean = a_round(FedAvg(), [*honest, torch.full((50,), 1e30)])
    assert mean.params.norm() > 1e28


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_blocks_do_not_show(rule: FedAvg, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = drawn(9, 100)
    whole = a_round(rule, deltas).params
    monkeypatch.setattr(robust, "ELEMENTS", 7 * 9)  # fourteen blocks of 7 coordinates and one of 2
    assert len(list(robust.blocks(deltas))) == 15
    in_blocks = a_round(rule, deltas).params
    if rule.elementwise:
        assert torch.equal(in_blocks, whole)
    torch.testing.assert_close(in_blocks, whole)


def test_a_block_holds_no_more_than_its_share_of_memory() -> None:
    deltas = [torch.zeros(robust.ELEMENTS)] * 4
    assert [x_KB.numel() for _, x_KB in robust.blocks(deltas)] == [robust.ELEMENTS] * 4


def test_distances_are_those_of_the_differences() -> None:
    deltas = [*drawn(6, 1000), torch.full((1000,), 1e15)]
    squares = squared_distances(deltas)
    for i in range(6):
        for j in range(6):
            assert squares[i, j].item() == pytest.approx(
                (deltas[i].double() - deltas[j]).square().sum().item(), rel=1e-9
            )
    # 1000 * (1e15)^2, in float64
    assert squares[6, 0].item() == pytest.approx(1e33, rel=1e-6)


def test_clients_weights_count_in_rfa_alone() -> None:
    for rule in RULES:
        sent, _ = rule.finish(Update(0, 0.25, torch.zeros(3)), Broadcast(0, torch.zeros(3)), {})
        assert sent.weight == (0.25 if rule.kind == "rfa" else 1.0)
