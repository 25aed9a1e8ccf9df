import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.columns import keys, labels, numbers, texts
from datasets_partition.core.types import DataError


def test_keys_are_in_the_order_of_their_text_and_labels_of_their_values():
    table = pa.table({"n": [10, 2, 10, 1]})
    codes, names = keys(table, "key", "n")
    assert names.to_pylist() == ["1", "10", "2"] and codes.tolist() == [1, 2, 1, 0]
    coded = labels(table, "label", "n")
    assert coded.values.to_pylist() == ["1", "2", "10"] and coded.codes.tolist() == [2, 1, 2, 0]
    assert coded.texts().to_pylist() == ["10", "2", "10", "1"]


def test_text_is_sorted_by_code_points():
    assert keys(pa.table({"k": ["é", "b", "Z", "a"]}), "data.partition.key", "k").values.to_pylist() == [
        "Z",
        "a",
        "b",
        "é",
    ]


@pytest.mark.parametrize("read", [keys, labels])
@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([["b", "a"], [], ["c", "b"]]),
        pa.chunked_array([pa.array(["b", "a"]).dictionary_encode(), pa.array(["c", "b"]).dictionary_encode()]),
        pa.chunked_array([pa.array(["b", "a", "c", "b"], pa.large_string())]),
    ],
)
def test_chunks_and_dictionaries_are_read_as_one_column(read, column):
    codes, names = read(pa.table({"k": column}), "data.partition.key", "k")
    assert names.type == pa.string() and names.to_pylist() == ["a", "b", "c"]
    assert codes.dtype == np.int32 and codes.tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize("read", [keys, labels])
@pytest.mark.parametrize(
    ("column", "nameless"),
    [
        (pa.array(["a", None, "", None]), 3),
        (pa.array([None, None], pa.string()), 2),
        (pa.array([None, None]), 2),
        (pa.array([1, None]), 1),
        (pa.array(["a", None, "a"]).dictionary_encode(), 1),
        (pa.array([1.0, float("nan"), 2.5]), 1),
    ],
)
def test_rows_without_a_value_are_counted(read, column, nameless):
    with pytest.raises(DataError, match=rf"'k', which is null or empty in {nameless} of {len(column)} rows: fill it"):
        read(pa.table({"k": column}), "data.partition.key", "k")


def test_a_row_without_a_value_is_shown_by_its_content():
    table = pa.table({"k": ["a", None, None], "completion": ["x", "the second " + "y" * 999, "z"]})
    with pytest.raises(DataError, match=r"; the first is \{'k': None, 'completion': 'the second y{50,140}$"):
        keys(table, "data.partition.key", "k")


@pytest.mark.parametrize("read", [keys, labels])
def test_bytes_that_are_no_text_are_no_keys(read):
    assert read(pa.table({"k": [b"a", b"b"]}), "data.partition.key", "k").values.to_pylist() == ["a", "b"]
    with pytest.raises(DataError, match=r"^data\.partition\.key names 'k', which holds binary that is not all text: "):
        read(pa.table({"k": [b"a", b"\xff"]}), "data.partition.key", "k")


def test_lists_are_no_keys():
    with pytest.raises(DataError, match=r"data\.partition\.key names 'k', which holds list<.*>: name text or numbers"):
        keys(pa.table({"k": [[1], [2]]}), "data.partition.key", "k")


def test_an_empty_table_has_no_keys():
    codes, names = keys(pa.table({"k": pa.chunked_array([], pa.string())}), "data.partition.key", "k")
    assert len(codes) == len(names) == 0


def test_numbers_may_be_written_as_text():
    assert numbers(pa.table({"x": ["1", "-2.5", "1e3"]}), "data.partition.column", "x").tolist() == [1.0, -2.5, 1000.0]
    assert numbers(pa.table({"x": [1, 2]}), "data.partition.column", "x").tolist() == [1.0, 2.0]


@pytest.mark.parametrize("column", [["1", "two"], [[1], [2]]])
def test_what_is_no_number_is_refused(column):
    with pytest.raises(DataError, match=r"data\.partition\.column names 'x', which holds .* not all numbers: name a"):
        numbers(pa.table({"x": column}), "data.partition.column", "x")


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_what_is_no_finite_number_is_counted(bad):
    with pytest.raises(DataError, match=r"'x', which is null or not finite in 2 of 3 rows: fill it in, or leave"):
        numbers(pa.table({"x": [bad, 1.0, bad]}), "data.partition.column", "x")


TURNS = [[{"role": "user", "content": "hé"}, {"role": "assistant", "content": "b"}], [], None, [{"content": None}]]


def test_text_is_what_a_column_says_or_what_its_turns_say():
    table = pa.table({"t": ["a", None, "c", ""], "m": TURNS})
    assert [text.to_pylist() for text in texts(table, ("t", "m"))] == [["a", "", "c", ""], ["hé\nb", "", "", ""]]
    assert texts(table.slice(3), ("m",))[0].to_pylist() == [""]


def test_without_names_all_content_is_text():
    table = pa.table({"client": ["x"], "prompt": ["a"], "completion": ["b"], "label": [True]})
    assert [text.to_pylist() for text in texts(table, None)] == [["a"], ["b"]]
    assert [text.to_pylist() for text in texts(pa.table({"messages": TURNS[:1]}), None)] == [["hé\nb"]]


@pytest.mark.parametrize("column", [[1], [[1]]])
def test_what_is_no_text_is_refused(column):
    with pytest.raises(DataError, match=r"data\.partition\.columns names 'x', which holds .*: name columns of text"):
        texts(pa.table({"x": column}), ("x",))


def test_labels_may_be_booleans():
    coded = labels(pa.table({"label": [True, False, True]}), "label", "label")
    assert coded.values.to_pylist() == ["false", "true"] and coded.codes.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "kept"), [("text", "completion"), ("output", "completion"), ("instruction", "prompt"), ("input", "prompt")]
)
def test_an_error_names_the_canonical_column_of_a_sources_column(name, kept):
    table = pa.table({"client": ["x"], "prompt": [""], "completion": ["b"]})
    with pytest.raises(DataError) as error:
        texts(table, (name,))
    assert str(error.value) == (
        f"data.partition.columns names '{name}', which the rows do not have (a source's {name} is kept in {kept}): "
        'name one of client, prompt, completion, or use kind = "iid"'
    )
    with pytest.raises(DataError, match=r"which the rows do not have: name one of messages, or use"):
        texts(pa.table({"messages": TURNS[:1]}), (name,))
