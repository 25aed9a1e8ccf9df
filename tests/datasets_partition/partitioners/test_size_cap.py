import numpy as np
import pyarrow as pa

from datasets_partition.partitioners.by_size import SizeCap

TABLE = pa.table({"prompt": [str(row) for row in range(10)]})


def test_rows_are_split_evenly_in_their_order(rng):
    clients, names, *_ = SizeCap(rows=4).assign(TABLE, rng())
    assert clients.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert names.to_pylist() == ["0", "1", "2"]


def test_the_surplus_is_dropped_at_random(rng):
    partitioner = SizeCap(rows=4, surplus="drop")
    clients, names, *_ = partitioner.assign(TABLE, rng())
    assert np.bincount(clients + 1).tolist() == [6, 4]
    assert names.to_pylist() == ["0"]
    assert clients.tolist() != partitioner.assign(TABLE, rng(6)).clients.tolist()


def test_a_cap_that_is_not_reached_changes_nothing(rng):
    for partitioner in (SizeCap(rows=10), SizeCap(rows=10, surplus="drop")):
        assert partitioner.assign(TABLE, rng()).clients.tolist() == [0] * 10
