import pytest
import torch

from strategies.core.layout import Layout

LAYOUT = Layout(("norm", "q.lora_A.default.weight", "q.lora_B.default.weight"), ((2,), (1, 3), (2, 1)), scale=2.0)


def test_tensors_lie_one_after_another_and_write_through() -> None:
    flat = torch.arange(7.0)
    views = LAYOUT.views(flat)
    assert {name: view.tolist() for name, view in views.items()} == {
        "norm": [0, 1],
        "q.lora_A.default.weight": [[2, 3, 4]],
        "q.lora_B.default.weight": [[5], [6]],
    }
    views["q.lora_A.default.weight"][0, 1] = -3
    flat[6] = -6
    assert flat.tolist() == [0, 1, 2, -3, 4, 5, -6]
    assert views["q.lora_B.default.weight"].tolist() == [[5], [-6]]


def test_lora_pairs_are_views_with_the_scale() -> None:
    flat = torch.arange(7.0)
    (pair,) = LAYOUT.lora_pairs(flat)
    assert (pair.name, pair.scale) == ("q", 2.0)
    assert (pair.a_RI.tolist(), pair.b_OR.tolist()) == ([[2, 3, 4]], [[5], [6]])
    pair.b_OR.zero_()
    assert flat.tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert not list(Layout(("weight",), ((2, 2),)).lora_pairs(torch.zeros(4)))


def test_of_keeps_the_order_and_sizes_add_up() -> None:
    tensors = [("b", torch.zeros(2, 3)), ("a", torch.zeros(())), ("none", torch.zeros(0, 4))]
    layout = Layout.of(tensors, 0.5)
    assert layout == Layout(("b", "a", "none"), ((2, 3), (), (0, 4)), 0.5)
    assert layout.size == 7
    assert layout.views(torch.arange(7.0))["a"].item() == 6


def test_stacked_vectors_are_seen_row_by_row() -> None:
    stacked = torch.arange(21.0).view(3, 7)
    for row, alone in enumerate(stacked):
        for name, view in LAYOUT.views(alone).items():
            assert torch.equal(LAYOUT.views(stacked)[name][row], view)
    LAYOUT.views(stacked)[LAYOUT.names[0]][1] = 0
    assert not LAYOUT.views(stacked[1])[LAYOUT.names[0]].any() and stacked[0].any() and stacked[2].all()


@pytest.mark.parametrize("shape", [(6,), (8,), (7, 1), ()])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="describes 7 elements"):
        LAYOUT.views(torch.zeros(shape))
