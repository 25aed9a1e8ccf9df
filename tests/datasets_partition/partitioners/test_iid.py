import numpy as np
import pyarrow as pa

from datasets_partition.partitioners.by_size import Iid

TABLE = pa.table({"prompt": ["x"] * 103})


def test_rows_are_dealt_evenly_and_by_the_rng(rng):
    clients, names, *_ = Iid(clients=11).assign(TABLE, rng())
    assert names.to_pylist() == [f"{client:02d}" for client in range(11)]
    assert np.bincount(clients).tolist() == [10] * 4 + [9] * 7
    assert clients.tolist() != Iid(clients=11).assign(TABLE, rng(6)).clients.tolist()


def test_every_row_is_as_likely_anyones(rng):
    draws = np.stack([Iid(clients=3).assign(TABLE, rng(seed)).clients for seed in range(900)])
    for client in range(3):
        assert np.abs((draws == client).mean(axis=0) - 1 / 3).max() < 0.07  # 4.5 standard errors


def test_as_many_clients_as_rows(rng):
    assert sorted(Iid(clients=103).assign(TABLE, rng()).clients.tolist()) == list(range(103))
