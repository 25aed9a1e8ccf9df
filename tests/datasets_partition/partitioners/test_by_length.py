import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.continuous import ByLength

TABLE = pa.table({"prompt": ["aaaa", "éé", "", "a"], "completion": ["a", "", None, "aaa"], "note": ["", "", "abc", ""]})


def test_the_first_client_has_the_shortest_rows(rng):
    assert ByLength(clients=2).assign(TABLE, rng()).clients.tolist() == [1, 0, 0, 1]  # 5, 2, 0, 4 characters
    assert ByLength(clients=4).assign(TABLE, rng()).clients.tolist() == [3, 1, 0, 2]


def test_the_columns_can_be_named(rng):
    assert ByLength(clients=4, columns=("prompt", "note")).assign(TABLE, rng()).clients.tolist() == [3, 1, 2, 0]


def test_turns_are_as_long_as_what_they_say(rng):
    said = [[{"role": "user", "content": "x" * length}] for length in (9, 1, 5)]
    assert ByLength(clients=3).assign(pa.table({"messages": said}), rng()).clients.tolist() == [2, 0, 1]


def test_rows_that_are_all_as_long_are_refused(rng):
    with pytest.raises(DataError, match=r"sorts rows by a number that is 0 in all of them"):
        ByLength(clients=2, columns=("note",)).assign(TABLE.slice(0, 2), rng())
