import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners import by_label
from datasets_partition.partitioners.by_label import Pathological

LABELS = np.repeat(range(4), (7, 5, 4, 6))
TABLE = pa.table({"label": LABELS})


def mixtures(partitioner, rng):
    clients = partitioner.assign(TABLE, rng).clients
    return np.stack([np.bincount(LABELS[clients == client], minlength=4) for client in range(partitioner.clients)])


def test_deterministic_by_hand(rng):
    mixture = mixtures(Pathological(label="label", clients=4, classes=2, mode="deterministic"), rng())
    assert mixture.tolist() == [[4, 3, 0, 0], [0, 2, 2, 0], [0, 0, 2, 3], [3, 0, 0, 3]]


def test_rows_of_a_label_that_no_client_has_belong_to_nobody(rng):
    clients = Pathological(label="label", clients=2, classes=1, mode="deterministic").assign(TABLE, rng()).clients
    assert clients.tolist() == [0] * 7 + [1] * 5 + [-1] * 10


@pytest.mark.parametrize("mode", ["random", "first_deterministic", "deterministic"])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_each_client_has_so_many_labels_and_shares_them_evenly(mode, classes, rng):
    for seed in range(30):
        mixture = mixtures(Pathological(label="label", clients=4, classes=classes, mode=mode), rng(seed))
        assert ((mixture > 0).sum(axis=1) == classes).all()
        for label, rows in enumerate((7, 5, 4, 6)):
            held = mixture[:, label][mixture[:, label] > 0]
            assert held.size == 0 or (held.sum() == rows and np.ptp(held) <= 1)
        if mode == "first_deterministic":
            assert mixture.diagonal().all()


def test_all_pairs_of_labels_are_as_likely(rng):
    seen = [
        tuple(np.flatnonzero(row))
        for seed in range(500)
        for row in mixtures(Pathological(label="label", clients=4), rng(seed))
    ]
    for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert seen.count(pair) / 2000 == pytest.approx(1 / 6, abs=0.04)


def test_blocks_of_clients_are_one_draw_after_the_other(rng, monkeypatch):
    for mode in ("random", "first_deterministic"):
        partitioner = Pathological(label="label", clients=4, classes=2, mode=mode)
        expected = mixtures(partitioner, rng())
        with monkeypatch.context() as patch:
            patch.setattr(by_label, "BLOCK", 5)
            assert (mixtures(partitioner, rng()) == expected).all()


def test_more_classes_than_labels_are_refused(rng):
    with pytest.raises(DataError, match=r"classes is 5, but 'label' has only 4 values: ask for 4 or fewer"):
        Pathological(label="label", clients=2, classes=5).assign(TABLE, rng())


def test_a_label_with_fewer_rows_than_clients_is_refused(rng):
    with pytest.raises(DataError, match=r"gives the label '2' to 5 clients, but it has only 4 rows: ask for fewer cli"):
        Pathological(label="label", clients=5, classes=4).assign(TABLE, rng())
