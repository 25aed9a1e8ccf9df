from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.by_label import Dirichlet
from datasets_partition.partitioners.by_size import Iid, SizeCap
from datasets_partition.partitioners.combined import Combined
from datasets_partition.partitioners.natural import ByTime, GroupedNatural, Natural

TABLE = pa.table(
    {
        "client": ["b", "a", "b", "b", "b", "b", "c", "c"],
        "label": ["x", "y", "y", "x", "x", "y", "x", "y"],
        "time": [5, 1, 3, 4, 1, 2, 2, 1],
    }
)


def test_the_second_partitions_each_client_of_the_first(rng):
    clients, names, category, order, _ = Combined(first=Natural(), then=SizeCap(rows=2)).assign(TABLE, rng())
    assert names.to_pylist() == ["a", "b/0", "b/1", "b/2", "c"]
    assert clients.tolist() == [1, 0, 1, 2, 2, 3, 4, 4]
    assert category is None and order is None


def test_a_cap_makes_what_grouped_natural_makes_at_once(rng):
    for rows in (1, 2, 3, 5):
        combined = Combined(first=Natural(), then=SizeCap(rows=rows)).assign(TABLE, rng())
        at_once = GroupedNatural(max_rows=rows).assign(TABLE, rng())
        assert combined.clients.tolist() == at_once.clients.tolist() and combined.names.equals(at_once.names)


def test_rows_that_either_partition_drops_belong_to_nobody(rng):
    drop = SizeCap(rows=3, surplus="drop")
    clients, names, *_ = Combined(first=Natural(), then=drop).assign(TABLE, rng())
    assert names.to_pylist() == ["a", "b", "c"] and np.bincount(clients + 1).tolist() == [2, 1, 3, 2]
    clients, names, *_ = Combined(first=GroupedNatural(keys=2, rest="drop"), then=SizeCap(rows=3)).assign(TABLE, rng())
    assert names.to_pylist() == ["0/0", "0/1"] and clients.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]


def test_a_client_in_time_is_cut_into_stretches_of_time(rng):
    clients, names, _, order, _ = Combined(first=ByTime(time="time"), then=SizeCap(rows=3)).assign(TABLE, rng())
    assert names.to_pylist() == ["a", "b/0", "b/1", "c"]
    assert clients.tolist() == [2, 0, 1, 2, 1, 1, 3, 3]  # b at 1, 2, 3, then at 4 and 5
    for client in range(4):
        rows = np.flatnonzero(clients == client)
        times = TABLE["time"].to_numpy()[rows[np.argsort(order[rows])]].tolist()
        assert times == sorted(times)


def test_category_and_order_of_the_second_are_kept(rng):
    assignment = Combined(first=GroupedNatural(keys=2, rest="drop"), then=Dirichlet(label="label", clients=1)).assign(
        TABLE, rng()
    )
    assert assignment.category.to_pylist() == ["x", "y", "y", "x", "x", "y", None, None]  # the last two are nobody's
    assignment = Combined(first=Iid(clients=1), then=ByTime(time="time")).assign(TABLE, rng())
    rows = np.flatnonzero(assignment.clients == assignment.names.to_pylist().index("0/b"))
    assert rows[np.argsort(assignment.order[rows])].tolist() == [4, 5, 2, 3, 0]


def test_category_of_the_first_is_kept_where_the_second_has_none(rng):
    assignment = Combined(first=Dirichlet(label="label", clients=1), then=Iid(clients=2)).assign(TABLE, rng())
    assert assignment.category.equals(TABLE["label"].chunk(0))


def test_an_error_of_the_second_names_the_client_and_the_key(rng):
    with pytest.raises(DataError) as error:
        Combined(first=Natural(), then=Iid(clients=2)).assign(TABLE, rng())
    assert str(error.value) == (
        "for the client 'a' of data.partition.first: data.partition.then.clients is 2, but there are only 1 distinct "
        "rows: ask for 1 clients or fewer"
    )


def test_an_error_names_the_key_where_it_stands_at_any_depth(rng):
    within = Combined(first=Natural(key="author"), then=SizeCap(rows=1))
    for combined, place in (
        (Combined(first=Natural(key="author"), then=SizeCap(rows=1)), "first"),
        (Combined(first=within, then=SizeCap(rows=1)), "first.first"),
        (Combined(first=Iid(clients=1), then=within), "then.first"),
    ):
        with pytest.raises(DataError, match=rf"data\.partition\.{place}\.key names 'author', which the rows do not"):
            combined.assign(TABLE, rng())


def test_names_that_would_be_the_same_are_refused(rng):
    table = pa.table({"client": ["a", "a", "a/0"]})
    with pytest.raises(DataError, match=r"would name two clients 'a/0', one a part of a larger one: rename the key"):
        Combined(first=Natural(), then=SizeCap(rows=1)).assign(table, rng())


@dataclass(frozen=True, kw_only=True)
class OneByOne:
    """A cap that `Combined` does not know, and so asks for each client."""

    cap: SizeCap

    def assign(self, table, rng):
        return self.cap.assign(table, rng)


def uneven(clients, rows=3000):
    """Few clients with many rows, many with few."""
    drawn = np.random.default_rng(3)
    keys = np.minimum(drawn.pareto(0.7, rows) * 3, clients).astype(int)
    return pa.table({"client": pa.array(keys).cast(pa.string()), "time": drawn.integers(0, 99, rows)})


FIRSTS = [Natural(), ByTime(time="time"), GroupedNatural(keys=7, rest="drop")]


@pytest.mark.parametrize("first", FIRSTS, ids=repr)
@pytest.mark.parametrize("rows", [1, 2, 7, 40, 10**6])
def test_a_cap_for_all_clients_at_once_splits_as_one_by_one(first, rows, rng):
    cap = SizeCap(rows=rows)
    assignment = Combined(first=first, then=cap).assign(uneven(200), rng())
    expected = Combined(first=first, then=OneByOne(cap=cap)).assign(uneven(200), rng())
    assert assignment.names.equals(expected.names) and assignment.clients.tolist() == expected.clients.tolist()
    assert assignment.clients.dtype == expected.clients.dtype == np.int32
    assert assignment.category is expected.category is None
    assert (assignment.order is None) == (expected.order is None) and np.array_equal(assignment.order, expected.order)


@pytest.mark.parametrize("first", FIRSTS, ids=repr)
@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_a_cap_for_all_clients_at_once_drops_as_many_as_one_by_one(first, rows, rng):
    cap = SizeCap(rows=rows, surplus="drop")
    assignment = Combined(first=first, then=cap).assign(uneven(200), rng())
    expected = Combined(first=first, then=OneByOne(cap=cap)).assign(uneven(200), rng())
    assert assignment.names.equals(expected.names)
    assert np.bincount(assignment.clients + 1).tolist() == np.bincount(expected.clients + 1).tolist()
    whole = first.assign(uneven(200), rng()).clients
    assert (whole[assignment.clients >= 0] == assignment.clients[assignment.clients >= 0]).all()


def test_what_a_cap_drops_has_the_law_of_one_by_one(rng):
    # Each of the 10 pairs of b's 5 rows stays equally often, whichever of c's 3 rows and a's single row stay.
    table = pa.table({"client": ["b", "a", "b", "b", "c", "b", "c", "b", "c"]})
    cap = SizeCap(rows=2, surplus="drop")
    for then in (cap, OneByOne(cap=cap)):
        generator = rng()
        kept = [Combined(first=Natural(), then=then).assign(table, generator).clients >= 0 for _ in range(1500)]
        seen, counts = np.unique(np.stack(kept), axis=0, return_counts=True)
        assert len(seen) == 10 * 3 and seen[:, 1].all()
        assert ((counts - 50) ** 2 / 50).sum() < 70  # chi-squared with 29 degrees: beyond it in 3 of 100,000


@pytest.mark.parametrize("surplus", ["split", "drop"])
def test_a_cap_asks_nothing_of_the_second_for_each_client(surplus, rng, monkeypatch):
    monkeypatch.setattr(SizeCap, "assign", lambda *_: pytest.fail("asked for one client"))
    names = Combined(first=Natural(), then=SizeCap(rows=2, surplus=surplus)).assign(TABLE, rng()).names.to_pylist()
    assert names == (["a", "b/0", "b/1", "b/2", "c"] if surplus == "split" else ["a", "b", "c"])
