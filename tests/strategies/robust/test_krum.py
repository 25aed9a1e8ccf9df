import pytest
import torch

from strategies.robust.rules import Bulyan, Krum, MultiKrum, ranked

# |a - b|^2 = 1, |a - c|^2 = 4, |a - d|^2 = 2, |b - c|^2 = 5, |b - d|^2 = 1, |c - d|^2 = 2; e is far away
A, B, C, D, E = (
    torch.tensor(x) for x in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0], [100.0, 100.0, 100.0])
)


def test_krum_takes_the_update_with_the_closest_neighbors() -> None:
    # 5 - 1 - 2 = 2 neighbors: a 1 + 2, b 1 + 1, c 2 + 4, d 1 + 2
    assert Krum(f=1).combine([A, B, C, D, E]).tolist() == B.tolist()
    # 5 - 0 - 2 = 3 neighbors: a 1 + 2 + 4, b 1 + 1 + 5, c 2 + 4 + 5, d 1 + 2 + 2
    assert Krum(f=0).combine([A, B, C, D, E]).tolist() == D.tolist()


def test_of_equal_scores_the_first_client_wins() -> None:
    # a and d both score 3; b is the best
    squares = torch.tensor([[0.0, 1, 4, 2], [1, 0, 5, 1], [4, 5, 0, 2], [2, 1, 2, 0]])
    assert ranked(squares, 0) == [1, 0, 3, 2]


def test_multi_krum_averages_the_best() -> None:
    clients = [A, B, C, D, E]
    assert MultiKrum(f=1, m=1).combine(clients).tolist() == B.tolist()
    # b, and a before d: without m it is 5 - 1 - 2 = 2
    assert MultiKrum(f=1, m=2).combine(clients).tolist() == [0.5, 0, 0]
    assert MultiKrum(f=1).combine(clients).tolist() == [0.5, 0, 0]
    # a, b and d
    torch.testing.assert_close(MultiKrum(f=1, m=3).combine(clients), torch.tensor([2 / 3, 1 / 3, 0.0]))
    # all five: [102, 103, 100] / 5
    torch.testing.assert_close(MultiKrum(f=1, m=5).combine(clients), torch.tensor([20.4, 20.6, 20.0]))


def test_equal_updates_are_their_own_answer() -> None:
    for rule in (Krum(f=1), MultiKrum(f=1), Bulyan(f=1)):
        assert rule.combine([B] * 7).tolist() == B.tolist()


def on_a_line(*first: float) -> list[torch.Tensor]:
    """The client in fourth place stands out in the second coordinate too, too little to change who is selected."""
    return [torch.tensor([x, 0.1 if k == 3 else 0.0, 0.0]) for k, x in enumerate(first)]


def test_bulyan_selects_by_krum_and_averages_around_the_median() -> None:
    # K = 7, f = 1: five are selected, three values averaged. Scores to one decimal, of the first coordinate:
    # 4 neighbors: 0: 41.3, 1: 23.3, 2.5: 15, 3: 17.3, 5: 30.3, 7: 76.3               -> 2.5
    # 3 neighbors of those left: 0: 35, 1: 21, 3: 17, 5: 24, 7: 56                    -> 3
    # 2: 0: 26, 1: 17, 5: 20, 7: 40                                                    -> 1
    # 1: 0: 25, 5: 4, 7: 4                                                             -> 5, the first of two equal ones
    # 1 (3 - f - 2 would be 0): 0: 49, 7: 49                                           -> 0
    # Of 0, 1, 2.5, 3, 5 the median is 2.5, the nearest are 2.5, 3 and 1: 6.5 / 3. Of 0, 0, 0, 0.1, 0 three zeros.
    combined = Bulyan(f=1).combine(on_a_line(0, 1, 2.5, 3, 5, 7, 100))
    torch.testing.assert_close(combined, torch.tensor([6.5 / 3, 0.0, 0.0]))


def test_bulyan_against_nobody_is_the_mean() -> None:
    # (0 + 1 + 2 + 6) / 4 and 0.1 / 4
    torch.testing.assert_close(Bulyan(f=0).combine(on_a_line(0, 1, 2, 6)), torch.tensor([2.25, 0.025, 0.0]))


def test_an_even_selection_has_the_lower_median() -> None:
    # K = 8, f = 1: six values; the lower middle one is 2; the nearest four are 2, 3 (1), 1 (1) and 0 (2): 6 / 4
    x_SB = torch.tensor([[0.0], [1], [2], [3], [5], [7]])
    assert Bulyan(f=1).around_median(x_SB).item() == 1.5


@pytest.mark.parametrize("rule", [Krum(f=1), MultiKrum(f=1), Bulyan(f=1)], ids=lambda rule: rule.kind)
def test_where_the_liar_stands_is_irrelevant(rule: Krum) -> None:
    honest = on_a_line(0, 1, 2.5, 3, 5.5, 7)
    results = [rule.combine([*honest[:k], E * 1e9, *honest[k:]]).tolist() for k in range(7)]
    assert results == results[:1] * 7
