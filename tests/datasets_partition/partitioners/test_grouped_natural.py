import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.natural import GroupedNatural

TABLE = pa.table({"client": ["c", "a", "e", "b", "d", "a"]})


@pytest.mark.parametrize(
    ("keys", "rest", "clients"),
    [
        (2, "smaller", [1, 0, 2, 0, 1, 0]),
        (2, "bigger", [0, 0, 1, 0, 1, 0]),  # a, b, c; d, e
        (2, "drop", [1, 0, -1, 0, 1, 0]),
        (5, "refuse", [0, 0, 0, 0, 0, 0]),
        (1, "refuse", [2, 0, 4, 1, 3, 0]),
        (9, "smaller", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_keys_are_grouped_in_sorted_order(keys, rest, clients, rng):
    assignment = GroupedNatural(keys=keys, rest=rest).assign(TABLE, rng())
    assert assignment.clients.tolist() == clients
    assert assignment.names.to_pylist() == [str(number) for number in range(max(clients) + 1)]


@pytest.mark.parametrize(("keys", "rest"), [(2, "refuse"), (9, "bigger"), (9, "drop"), (9, "refuse")])
def test_keys_that_make_no_whole_groups_are_refused(keys, rest, rng):
    with pytest.raises(DataError, match=rf"keys is {keys}, but 'client' has 5 values, which make .* whole groups and"):
        GroupedNatural(keys=keys, rest=rest).assign(TABLE, rng())


def test_large_keys_are_split_in_the_order_of_their_rows(rng):
    table = pa.table({"client": ["b", "a", "b", "b", "b", "b", "c", "c"]})
    clients, names, *_ = GroupedNatural(max_rows=2).assign(table, rng())
    assert names.to_pylist() == ["a", "b/0", "b/1", "b/2", "c"]
    assert clients.tolist() == [1, 0, 1, 2, 2, 3, 4, 4]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 9))
def test_parts_are_as_few_and_as_even_as_can_be(rng, owners, max_rows):
    clients, names, *_ = GroupedNatural(key="k", max_rows=max_rows).assign(pa.table({"k": owners}), rng())
    sizes = np.bincount(clients)
    for owner in set(owners):
        parts = sorted(set(clients[np.array(owners) == owner].tolist()))
        assert len(parts) == -(-owners.count(owner) // max_rows)
        assert sizes[parts].max() <= max_rows and sizes[parts].max() - sizes[parts].min() <= 1
        assert (np.diff(clients[np.array(owners) == owner]) >= 0).all()
        assert {names[part].as_py().split("/")[0] for part in parts} == {str(owner)}


def test_names_that_would_be_the_same_are_refused(rng):
    with pytest.raises(DataError, match=r"would name two clients 'a/0'"):
        GroupedNatural(max_rows=1).assign(pa.table({"client": ["a", "a", "a/0"]}), rng())
