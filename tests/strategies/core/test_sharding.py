"""Cutting vectors into shards and reading them back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.core.layout import Layout
from strategies.core.sharding import Partition

LAYOUT = Layout(("w", "b"), ((2, 3), (3,)))


def test_slices_by_hand() -> None:
    assert Partition.contiguous(10, 2).intervals == (((0, 5),), ((5, 10),))
    assert Partition.contiguous(10, 4, unit=2).intervals == (((0, 4),), ((4, 8),), ((8, 10),), ((10, 10),))


def test_tensor_by_tensor_by_hand() -> None:
    partition = Partition.by_tensor(LAYOUT, 2)
    assert partition.intervals == (((0, 3), (6, 8)), ((3, 6), (8, 9)))
    flat = torch.arange(9.0)
    assert partition.cut(flat, 0).tolist() == [0, 1, 2, 6, 7] and partition.cut(flat, 1).tolist() == [3, 4, 5, 8]


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(1, 7))
def test_what_is_cut_is_read_back(shapes: list[list[int]], ranks: int) -> None:
    layout = Layout(tuple(map(str, range(len(shapes)))), tuple(map(tuple, shapes)))
    flat = torch.arange(float(layout.size))
    for partition in (Partition.by_tensor(layout, ranks), Partition.contiguous(layout.size, ranks, 2)):
        shards = [partition.cut(flat, rank) for rank in range(ranks)]
        lengths = [sum(last - first for first, last in of_rank) for of_rank in partition.intervals]
        assert [len(shard) for shard in shards] == lengths
        assert torch.equal(partition.join(shards), flat)
        for _, _, first, last in layout.places():
            assert torch.equal(partition.read(shards, first, last), flat[first:last])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_rank_has_all_and_nobody_shares(ranks: int) -> None:
    intervals = Partition.by_tensor(LAYOUT, ranks).intervals
    assert sorted(i for of_rank in intervals for first, last in of_rank for i in range(first, last)) == list(range(9))
