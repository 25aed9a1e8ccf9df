import datetime

import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.natural import ByTime


def assigned(times, rng, owners=None):
    return ByTime(time="t").assign(pa.table({"client": owners or ["a"] * len(times), "t": times}), rng)


def test_clients_are_natural_and_rows_are_ranked(rng):
    clients, names, category, order, _ = assigned([5, 3, 4, 3], rng(), ["b", "a", "b", "a"])
    assert names.to_pylist() == ["a", "b"] and clients.tolist() == [1, 0, 1, 0]
    assert order.tolist() == [3, 0, 2, 1]  # equal times keep the source's order
    assert category is None


@pytest.mark.parametrize(
    "times",
    [
        [10, 9, 100],
        [1.5, -2.0, 1e9],
        ["10", "9", "100"],  # as numbers, not as text
        ["1.5", "-2", "1e9"],
        ["2024-02-01", "2023-12-31", "2024-10-01"],
        ["2024-02-01T10:00", "2024-02-01T09:59:59.5", "2024-02-01 10:00:01"],
        ["2024-02-01T10:00:00Z", "2024-02-01T11:00:00+02:00", "2024-02-01T10:30:00+00:00"],
        [datetime.date(2024, 2, 1), datetime.date(2023, 12, 31), datetime.date(2024, 10, 1)],
        [datetime.datetime(2024, 2, 1), datetime.datetime(2023, 12, 31), datetime.datetime(2024, 10, 1)],
        [datetime.time(10), datetime.time(9), datetime.time(11)],
    ],
)
def test_times_of_any_kind_are_in_order(times, rng):
    assert assigned(times, rng()).order.tolist() == [1, 0, 2]


def test_large_numbers_written_as_text_are_not_rounded(rng):
    assert assigned([str(2**62 + 1), str(2**62)], rng()).order.tolist() == [1, 0]


@pytest.mark.parametrize("times", [["2024-01-01", "yesterday"], ["2024-01-01", "3"], ["2024-01-01", "2024-01-01T00Z"]])
def test_text_that_is_no_time_is_refused(times, rng):
    with pytest.raises(
        DataError, match=r"'t', whose text is not all numbers or all ISO dates \(.*\): write times such"
    ):
        assigned(times, rng())


@pytest.mark.parametrize("times", [[1, None, None], ["2024-01-01", None, None], [1.0, None, float("nan")]])
def test_rows_without_a_time_are_counted(times, rng):
    with pytest.raises(DataError, match=r"data\.partition\.time names 't', which is null in 2 of 3 rows: fill it in"):
        assigned(times, rng())


def test_what_cannot_be_a_time_is_refused(rng):
    with pytest.raises(DataError, match=r"names 't', which holds list<.*>: name a column of times"):
        assigned([[1], [2]], rng())
