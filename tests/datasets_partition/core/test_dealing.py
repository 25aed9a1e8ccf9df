import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import by_label, dealt, even, joined, listed, numbered, shared_out
from datasets_partition.core.types import DataError


def test_numbers_are_padded_so_that_they_sort():
    assert numbered(1).to_pylist() == ["0"]
    assert numbered(11).to_pylist() == [f"{number:02d}" for number in range(11)]


def test_even_parts_differ_by_one_at_most():
    assert even(11, 4).tolist() == [3, 3, 3, 2]
    assert even(8, 4).tolist() == [2, 2, 2, 2]


def test_rows_are_dealt_in_turn_and_the_rest_belongs_to_nobody():
    assert dealt(np.array([3, 1, 0, 2]), np.array([1, 2])).tolist() == [1, 1, -1, 0]


def test_clients_without_rows_are_not_listed():
    clients, names = listed(np.array([2, -1, 0, 2], np.int32), pa.array(["a", "b", "c"]))
    assert clients.dtype == np.int32 and clients.tolist() == [1, -1, 0, 1]
    assert names.to_pylist() == ["a", "c"]


def test_parts_are_named_after_what_they_are_parts_of():
    owners = np.array([0, 1, 1])
    assert joined(pa.array(["a", "b"]), owners, pa.array(["0", "0", "1"])).to_pylist() == ["a", "b/0", "b/1"]
    with pytest.raises(DataError, match=r"would name two clients 'b/0', .*: rename the key of either"):
        joined(pa.array(["b/0", "b"]), owners, pa.array(["0", "0", "1"]))


def test_rows_come_label_after_label_at_random_within_each(rng):
    coded = labels(pa.table({"label": ["b", "a", "b", "a"] * 50}), "label", "label")
    order, counts = by_label(coded, rng())
    assert counts.tolist() == [100, 100]
    assert (coded.codes[order] == np.repeat([0, 1], 100)).all()
    assert sorted(order.tolist()) == list(range(200)) and (np.diff(order[:100]) < 0).any()


@pytest.mark.parametrize(
    ("rows", "weights", "offset", "counts"),
    [
        (10, [0.6, 0.3, 0.1], 0.5, [6, 3, 1]),  # 0.6 + 0.3 is less than 0.9 in floats
        (10, [1, 1, 1], 0.5, [3, 4, 3]),
        (1, [1, 1], 0.25, [0, 1]),
        (1, [1, 1], 0.75, [1, 0]),
        (5, [0, 1, 0], 0.5, [0, 5, 0]),
        (0, [1, 1], 0.5, [0, 0]),
    ],
)
def test_rows_are_shared_out_by_hand(rows, weights, offset, counts):
    assert shared_out(rows, np.array(weights, dtype=np.float64), offset).tolist() == counts


@given(
    st.integers(0, 10**6),
    st.lists(st.floats(0, 1), min_size=1, max_size=50).filter(lambda weights: sum(weights) > 1e-9),
    st.floats(0, 1, exclude_max=True),
)
def test_everyone_gets_the_share_to_less_than_a_row(rows, weights, offset):
    counts = shared_out(rows, np.array(weights), offset)
    assert counts.sum() == rows
    assert (np.abs(counts - rows * np.array(weights) / np.sum(weights)) < 1 + 1e-6).all()
    assert not counts[np.array(weights) == 0].any()


def test_a_random_offset_gives_each_its_share_on_average(rng):
    weights = np.array([0.05, 0.25, 0.7])
    counts = np.mean([shared_out(2, weights, offset) for offset in rng().random(4000)], axis=0)
    assert counts == pytest.approx(2 * weights, abs=0.03)
