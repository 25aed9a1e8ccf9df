import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import (
    floats_at,
    fold,
    folded,
    products,
    put,
    slices,
    start_at,
    svd,
    zeroed,
)
from strategies.core.protocol import Broadcast

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"
LAYOUT = Layout(("norm", A, B, "bias"), ((1,), (2, 3), (2, 2), (2,)), scale=0.5)
VECTOR = torch.tensor([9.0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 7, 8])


def test_the_halves_of_a_vector() -> None:
    assert slices(LAYOUT, LORA_A) == [slice(1, 7)]
    assert slices(LAYOUT, LORA_B) == [slice(7, 11)]
    assert LAYOUT.size - floats_at(LAYOUT, 0) == 10
    assert zeroed(VECTOR.clone(), LAYOUT, LORA_A).tolist() == [9, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 7, 8]
    assert zeroed(VECTOR.clone(), LAYOUT, LORA_A, LORA_B).tolist() == [9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 8]
    grad_KP = torch.stack([VECTOR, VECTOR])
    zeroed(grad_KP, LAYOUT, LORA_B)
    assert grad_KP.tolist() == [[9, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 7, 8]] * 2


def test_products_lie_as_a_residual_does() -> None:
    # 0.5 * [[1, 2], [3, 4]] @ [[1, 2, 3], [4, 5, 6]] = 0.5 * [[9, 12, 15], [19, 26, 33]]
    (product,) = LAYOUT.products(products(VECTOR, LAYOUT))
    assert product.tolist() == [[4.5, 6, 7.5], [9.5, 13, 16.5]]


def test_a_lower_rank_has_its_own_scale() -> None:
    # alpha = 0.5 * 2 = 1: a client of rank 1 has the scale 1, twice the layout's.
    broadcast = Broadcast(0, VECTOR, layout=LAYOUT, lora_rank=1)
    assert fold(broadcast) == 2
    vector = start_at(broadcast, 1)
    assert vector.tolist() == [9, 1, 2, 3, 0, 0, 0, 0.5, 0, 1.5, 0, 7, 8]
    assert folded(vector, broadcast).tolist() == [9, 1, 2, 3, 0, 0, 0, 1, 0, 3, 0, 7, 8]
    assert VECTOR[7].item() == 1


def test_without_mixed_ranks_a_client_starts_from_the_global_vector() -> None:
    broadcast = Broadcast(0, VECTOR, layout=LAYOUT)
    assert fold(broadcast) == 1
    assert torch.equal(start_at(broadcast, None), VECTOR)
    assert torch.equal(folded(VECTOR, broadcast), VECTOR)


@pytest.mark.parametrize(("rank", "floats"), [(None, 13), (2, 13), (1, 8), (0, 3), (5, 28)])
def test_traffic_grows_with_the_rank(rank: int | None, floats: int) -> None:
    assert floats_at(LAYOUT, rank) == floats


@settings(deadline=None)  # the first call of LAPACK takes its time
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_the_svd_keeps_the_product(outputs: int, inputs: int, rank: int, seed: int, untrained: bool) -> None:
    layout = Layout((A, B), ((rank, inputs), (outputs, rank)), scale=3.0)
    params = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    (pair,) = layout.lora_pairs(params)
    if untrained:
        pair.b_OR.zero_()
    product_OI = pair.b_OR @ pair.a_RI
    u_OR, s_R, v_RI = svd(pair)
    assert len(s_R) == min(outputs, inputs, rank)
    assert bool((s_R[:-1] >= s_R[1:]).all())
    torch.testing.assert_close(u_OR.T @ u_OR, torch.eye(len(s_R)), rtol=0, atol=1e-5)
    torch.testing.assert_close(v_RI @ v_RI.T, torch.eye(len(s_R)), rtol=0, atol=1e-5)
    put(pair, u_OR * s_R, v_RI)
    torch.testing.assert_close(pair.b_OR @ pair.a_RI, product_OI, rtol=0, atol=1e-4)


def test_put_fills_with_zeros_and_cuts() -> None:
    params = VECTOR.clone()
    (pair,) = LAYOUT.lora_pairs(params)
    put(pair, torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]))
    assert params.tolist() == [9, 3, 4, 5, 0, 0, 0, 1, 0, 2, 0, 7, 8]
    put(pair, torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.arange(9.0).view(3, 3))
    assert params.tolist() == [9, 0, 1, 2, 3, 4, 5, 1, 2, 4, 5, 7, 8]
