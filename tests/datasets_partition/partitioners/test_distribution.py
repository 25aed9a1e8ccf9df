import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.by_label import Distribution

LABELS = np.array(["news"] * 10 + ["law"] * 4)
TABLE = pa.table({"label": LABELS})


def test_shares_are_met_by_hand(rng):
    shares = {"news": (0.6, 0.3, 0.1), "law": (0, 3, 1)}
    clients, names, category, *_ = Distribution(label="label", shares=shares).assign(TABLE, rng())
    assert np.bincount(clients[LABELS == "news"]).tolist() == [6, 3, 1]
    assert np.bincount(clients[LABELS == "law"]).tolist() == [0, 3, 1]
    assert names.to_pylist() == ["0", "1", "2"]
    assert category.to_pylist() == LABELS.tolist()


def test_rows_are_drawn_at_random(rng):
    partitioner = Distribution(label="label", shares={"news": (5, 5), "law": (2, 2)})
    assert partitioner.assign(TABLE, rng(1)).clients.tolist() != partitioner.assign(TABLE, rng(2)).clients.tolist()


def test_labels_of_rows_and_of_shares_are_the_same(rng):
    with pytest.raises(
        DataError, match=r"shares has no 'law', which rows have as 'label': give shares for each of law, n"
    ):
        Distribution(label="label", shares={"news": (1, 1)}).assign(TABLE, rng())
    with pytest.raises(
        DataError, match=r"shares has 'art', which no row has as 'label': take it out, there are law, n"
    ):
        Distribution(label="label", shares={"news": (1, 1), "law": (1, 1), "art": (1, 1)}).assign(TABLE, rng())


def test_a_share_that_is_less_than_a_row_of_each_label_is_refused(rng):
    with pytest.raises(DataError, match=r"gives client 1 less than a row of each label: raise its shares"):
        Distribution(label="label", shares={"news": (99, 1), "law": (1, 0)}).assign(TABLE, rng())
