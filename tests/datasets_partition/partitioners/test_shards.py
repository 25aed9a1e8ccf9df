import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.by_label import Shards

LABELS = np.arange(100) % 10
TABLE = pa.table({"label": LABELS})


def mixtures(partitioner, rng, table=TABLE):
    """How many rows of each label, a column, each client has, a row; nobody's come first."""
    clients = partitioner.assign(table, rng).clients
    labels = table["label"].to_numpy()
    return np.stack([np.bincount(labels[clients == client], minlength=10) for client in range(-1, partitioner.clients)])


def test_shards_that_fit_the_labels_give_each_client_whole_labels(rng):
    mixture = mixtures(Shards(label="label", clients=5, shards=2), rng())
    assert not mixture[0].any()
    assert np.sort(mixture[1:], axis=1)[:, -2:].tolist() == [[10, 10]] * 5
    assert mixture.sum(axis=0).tolist() == [10] * 10


def test_shards_are_cut_across_labels_by_hand(rng):
    table = pa.table({"label": [1, 0, 1, 0, 1, 0]})  # sorted and in three: 0 0, 0 1, 1 1
    seen = {
        tuple(map(tuple, mixtures(Shards(label="label", clients=3, shards=1), rng(seed), table)[1:, :2]))
        for seed in range(60)
    }
    assert len(seen) == 6  # every order of the three
    assert {tuple(sorted(order)) for order in seen} == {((0, 2), (1, 1), (2, 0))}


@pytest.mark.parametrize(
    ("shards", "shard_rows", "keep_rest", "sizes"),
    [
        (2, None, False, [4, 16, 16, 16, 16, 16, 16]),  # 12 shards of 8
        (2, 5, False, [40, 10, 10, 10, 10, 10, 10]),
        (None, 9, False, [1, 18, 18, 18, 18, 18, 9]),  # 11 shards
    ],
)
def test_sizes_are_as_the_keys_say(shards, shard_rows, keep_rest, sizes, rng):
    partitioner = Shards(label="label", clients=6, shards=shards, shard_rows=shard_rows, keep_rest=keep_rest)
    assert mixtures(partitioner, rng()).sum(axis=1).tolist() == sizes


def test_the_rest_can_be_a_shard(rng):
    sizes = mixtures(Shards(label="label", clients=6, shard_rows=9, keep_rest=True), rng()).sum(axis=1)
    assert sizes[0] == 0 and sizes.sum() == 100
    assert sorted(sizes[1:].tolist()) in ([10, 18, 18, 18, 18, 18], [9, 10, 18, 18, 18, 18, 18])


def test_more_shards_than_rows_make_are_refused(rng):
    with pytest.raises(
        DataError, match=r"asks for 120 shards \(60 clients, 2 each or more\), but 100 .* only 100 of 1 r"
    ):
        Shards(label="label", clients=60, shards=2).assign(TABLE, rng())
    with pytest.raises(
        DataError, match=r"asks for 6 shards .* make only 5 of 20 rows: ask for fewer clients or shards"
    ):
        Shards(label="label", clients=6, shard_rows=20).assign(TABLE, rng())
