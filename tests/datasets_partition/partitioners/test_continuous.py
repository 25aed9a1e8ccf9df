import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.continuous import Continuous

VALUES = np.random.default_rng(3).permutation(2000) / 7
TABLE = pa.table({"x": VALUES})


def test_strictness_1_sorts(rng):
    clients = Continuous(column="x", clients=3).assign(pa.table({"x": [3.0, -1, 7, 2, 5, 4, 6]}), rng()).clients
    assert clients.tolist() == [0, 0, 2, 0, 1, 1, 2]  # three, two and two of them


def test_strictness_0_does_not_look(rng):
    clients = Continuous(column="x", clients=4, strictness=0.0).assign(TABLE, rng()).clients
    assert np.bincount(clients).tolist() == [500] * 4
    means = [VALUES[clients == client].mean() for client in range(4)]
    assert np.ptp(means) < 0.3 * VALUES.std()
    same = pa.table({"x": [1.0] * 8})
    assert sorted(Continuous(column="x", clients=8, strictness=0.0).assign(same, rng()).clients.tolist()) == list(
        range(8)
    )


@pytest.mark.parametrize("strictness", [0.3, 0.5, 0.8])
def test_strictness_between_gives_the_correlation_of_its_law(strictness, rng):
    # The score s z + (1 - s) e has the correlation s / sqrt(s^2 + (1 - s)^2) with z; the client is the score's rank.
    clients = Continuous(column="x", clients=2000, strictness=strictness).assign(TABLE, rng()).clients
    correlation = np.corrcoef(clients, VALUES)[0, 1]
    assert correlation == pytest.approx(strictness / np.hypot(strictness, 1 - strictness), abs=0.04)


def test_equal_values_are_divided_at_random(rng):
    table = pa.table({"x": [0.0] * 50 + [1.0] * 50})
    clients = Continuous(column="x", clients=4).assign(table, rng()).clients
    assert set(clients[:50].tolist()) == {0, 1} and clients[:50].tolist() != sorted(clients[:50].tolist())


def test_a_column_of_one_value_is_refused(rng):
    with pytest.raises(DataError, match=r"by a number that is 2\.5 in all of them: choose another column, or use kin"):
        Continuous(column="x", clients=2, strictness=0.1).assign(pa.table({"x": [2.5, 2.5]}), rng())
