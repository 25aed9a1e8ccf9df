import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.by_label import InnerDirichlet, _turns

LABELS = np.repeat(range(3), (600, 300, 100))
TABLE = pa.table({"label": LABELS})


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 30), st.integers(1, 4), st.floats(0.01, 50))
def test_clients_have_their_sizes_and_no_row_twice(rng, sizes, more, labels, alpha):
    table = pa.table({"label": np.arange(sum(sizes) + more) ** 2 % labels})
    clients = InnerDirichlet(label="label", sizes=tuple(sizes), alpha=alpha).assign(table, rng()).clients
    assert np.bincount(clients + 1).tolist() == [more, *sizes]


def test_without_sizes_they_are_even(rng):
    assert np.bincount(InnerDirichlet(label="label", clients=7).assign(TABLE, rng()).clients).tolist() == [143] * 6 + [
        142
    ]


def test_a_large_alpha_gives_everyone_the_same_mixture_while_it_lasts(rng):
    # 3 clients of 30 rows take about 30 of each of three labels, which have that many.
    clients = InnerDirichlet(label="label", sizes=(30, 30, 30), alpha=1e6).assign(TABLE, rng()).clients
    for client in range(3):
        assert np.bincount(LABELS[clients == client], minlength=3) == pytest.approx(10, abs=9)


def test_a_tiny_alpha_gives_each_client_one_label_while_it_lasts(rng):
    clients = InnerDirichlet(label="label", sizes=(30, 30, 30), alpha=1e-6).assign(TABLE, rng()).clients
    assert [len(set(LABELS[clients == client].tolist())) for client in range(3)] == [1, 1, 1]


def test_all_rows_are_taken_where_labels_run_out_one_after_the_other(rng):
    for alpha in (1e-6, 0.1, 100.0):
        clients = InnerDirichlet(label="label", clients=20, alpha=alpha).assign(TABLE, rng()).clients
        assert np.bincount(clients).tolist() == [50] * 20


def test_turns_fall_on_any_client_that_is_not_full(rng):
    # By hand, two clients of 2 and 1 rows: 0 first in half the cases, then 0 or 1 in half of these; 1 first: 1 0 0.
    seen = [tuple(_turns(np.array([2, 1]), rng(seed)).tolist()) for seed in range(4000)]
    for turns, share in {(1, 0, 0): 0.5, (0, 1, 0): 0.25, (0, 0, 1): 0.25}.items():
        assert seen.count(turns) / 4000 == pytest.approx(share, abs=0.03)


def test_sizes_beyond_the_rows_are_refused(rng):
    with pytest.raises(DataError, match=r"sizes adds up to 1001, but there are only 1000 distinct rows: lower the siz"):
        InnerDirichlet(label="label", sizes=(1000, 1)).assign(TABLE, rng())


def test_an_alpha_for_each_label_is_in_their_order(rng):
    partitioner = InnerDirichlet(label="label", clients=3, alpha=(1.0, 2.0))
    with pytest.raises(DataError, match=r"alpha has 2 numbers for 3 labels: give one number, or one for each"):
        partitioner.assign(TABLE, rng())
    clients = InnerDirichlet(label="label", sizes=(30, 30), alpha=(1.0, 1.0, 1e6)).assign(TABLE, rng()).clients
    assert (LABELS[clients >= 0] == 2).mean() > 0.9
