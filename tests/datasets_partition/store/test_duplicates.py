import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition.core.types import DataError
from datasets_partition.store.contents import CONTENT_LEAK, content_numbers, first_of_each, refuse_leaks

COLUMNS = ("prompt", "completion")


def table(*rows: tuple[str, str]) -> pa.Table:
    prompts, completions = zip(*rows, strict=True)
    return pa.table({"prompt": prompts, "completion": completions, "other": range(len(rows))})


def test_rows_are_alike_where_all_of_their_content_is() -> None:
    numbers = content_numbers(table(("a", "b"), ("ab", ""), ("a", "b"), ("b", "a"), ("ab", "")), COLUMNS)
    assert numbers[0] == numbers[2] and numbers[1] == numbers[4]
    assert len(set(numbers.tolist())) == 3
    assert first_of_each(numbers).tolist() == [0, 1, 3]


def test_conversations_and_labels_count_too() -> None:
    talk = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], [{"role": "user", "content": "a"}]]
    numbers = content_numbers(pa.table({"messages": talk}), ("messages",))
    assert numbers[0] == numbers[2] != numbers[1]
    pairs = pa.table({"prompt": ["p", "p"], "label": [True, False]})
    assert len(set(content_numbers(pairs, ("prompt", "label")).tolist())) == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_numbers_are_equal_where_and_only_where_rows_are(rows: list[tuple[str, str]]) -> None:
    numbers = content_numbers(table(*rows), COLUMNS)
    for number, row in zip(numbers, rows, strict=True):
        assert [other == row for other in rows] == (numbers == number).tolist()
    assert [rows[i] for i in first_of_each(numbers)] == list(dict.fromkeys(rows))


def test_a_leak_is_an_error_that_shows_one_and_the_ways_out() -> None:
    rows = table(("p", "q"), ("p", "r"), ("p", "q"))
    numbers = content_numbers(rows, COLUMNS)
    refuse_leaks(rows, numbers, np.array([True, False, True]), COLUMNS, CONTENT_LEAK)
    said = r"1 held-out rows have the content of training rows, such as 'p \| q': remove them by .*\"drop\".*\"allow\""
    with pytest.raises(DataError, match=said):
        refuse_leaks(rows, numbers, np.array([True, True, False]), COLUMNS, CONTENT_LEAK)
