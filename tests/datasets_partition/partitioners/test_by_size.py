import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.by_size import BySize


def table(rows):
    return pa.table({"prompt": ["x"] * rows})


def sizes(partitioner, rows, rng):
    return np.bincount(partitioner.assign(table(rows), rng).clients + 1)[1:].tolist()


def test_laws_by_hand(rng):
    assert sizes(BySize(clients=4, law="linear"), 21, rng()) == [2, 4, 6, 9]  # tenths of 21: 2.1, 4.2, 6.3, 8.4
    assert sizes(BySize(clients=3, law="square"), 28, rng()) == [2, 8, 18]
    # e, e^2, e^3 are 9.003%, 24.473%, 66.524% of their sum
    assert sizes(BySize(clients=3, law="exponential"), 1000, rng()) == [90, 244, 666]


def test_given_sizes_are_kept_and_other_rows_belong_to_nobody(rng):
    clients, names, *_ = BySize(sizes=(5, 1, 2)).assign(table(11), rng())
    assert np.bincount(clients + 1).tolist() == [3, 5, 1, 2]
    assert names.to_pylist() == ["0", "1", "2"]


def test_rows_are_drawn_at_random(rng):
    partitioner = BySize(sizes=(5, 5))
    first, other = (partitioner.assign(table(10), rng(seed)).clients.tolist() for seed in (1, 2))
    assert first != other and first != sorted(first)


def test_lognormal_sizes_follow_their_law(rng):
    counts = np.array(sizes(BySize(clients=4000, law="lognormal", sigma=1.5), 4_000_000, rng()))
    assert counts.sum() == 4_000_000 and counts.min() >= 1
    logs = np.log(counts)
    assert logs.std() == pytest.approx(1.5, abs=0.06)
    assert np.mean(((logs - logs.mean()) / logs.std()) ** 3) == pytest.approx(0, abs=0.15)


def test_dirichlet_sizes_follow_their_law(rng):
    counts = np.array(sizes(BySize(clients=4000, law="dirichlet", alpha=2.0), 4_000_000, rng()))
    assert counts.sum() == 4_000_000 and counts.min() >= 1
    # The variance of a share of Dirichlet(a, ..., a) over n is (1/n) (1 - 1/n) / (n a + 1).
    assert (counts / 4e6).std() == pytest.approx(np.sqrt((1 / 4000) * (1 - 1 / 4000) / 8001), rel=0.05)


def test_lognormal_leaves_nobody_without_a_row(rng):
    assert sizes(BySize(clients=50, law="lognormal", sigma=5.0), 50, rng()) == [1] * 50
    assert min(sizes(BySize(clients=50, law="lognormal", sigma=5.0), 60, rng())) == 1


@pytest.mark.parametrize(("law", "most"), [("linear", 13), ("square", 6), ("exponential", 5)])
def test_too_many_clients_for_a_law_are_refused_with_how_many_there_may_be(law, most, rng):
    # With 100 rows: 13 * 14 / 2 is 91, 14 * 15 / 2 is 105; 6: 91, 7: 140; e^-4 to 1 gives 1.17%, e^-5 0.43%.
    with pytest.raises(DataError, match=rf'with law = "{law}" the first .* none of the 100 rows: ask for {most} clie'):
        BySize(clients=90, law=law).assign(table(100), rng())
    assert min(sizes(BySize(clients=most, law=law), 100, rng())) >= 1


def test_sizes_beyond_the_rows_are_refused(rng):
    with pytest.raises(DataError, match=r"sizes adds up to 12, but there are only 11 distinct rows: lower the sizes"):
        BySize(sizes=(6, 6)).assign(table(11), rng())
