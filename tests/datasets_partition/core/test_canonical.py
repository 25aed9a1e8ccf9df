import pyarrow as pa
import pytest

from datasets_partition.core.types import COLUMNS, TURNS, DataError, content_columns, format_of

TEXT = pa.array(["x"])
LABELS = {"boolean": pa.array([True]), "category": pa.array(["a"])}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_content_columns_say_the_format(name: str) -> None:
    columns = {column: LABELS["boolean"] if column == "label" else TEXT for column in COLUMNS[name]}
    table = pa.table({"zeta": TEXT, "client": TEXT} | columns)
    assert format_of(table) == name
    assert content_columns(table) == COLUMNS[name]


def test_a_label_that_is_a_category_is_no_content() -> None:
    table = pa.table({"prompt": TEXT, "completion": TEXT, "label": LABELS["category"]})
    assert content_columns(table) == ("prompt", "completion")


def test_turns_count_as_text_does() -> None:
    turns = pa.array([[{"role": "user", "content": "x"}]], TURNS)
    assert content_columns(pa.table({"prompt": turns, "chosen": turns, "rejected": turns})) == COLUMNS["preference"]


def test_other_columns_make_no_format() -> None:
    with pytest.raises(DataError, match=r"gives the columns client, text, which make no format: .*; messages; "):
        format_of(pa.table({"client": TEXT, "text": TEXT}))
