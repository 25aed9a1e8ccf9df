"""Columns beside a conversation that belong to it: its system prompt, and tools."""

from typing import Any

import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError, Rows
from datasets_partition.formats.conversion import Conversion

SAY = {"role": "user", "content": "Say a"}
SYSTEM = {"role": "system", "content": "Be brief"}


def from_json(*rows: dict[str, Any], **columns: str) -> Rows:
    conversion = Conversion(columns, "error")
    conversion.add_objects([(f"row {number}", row) for number, row in enumerate(rows, 1)])
    return conversion.rows("rows")


def from_arrow(*rows: dict[str, Any], **columns: str) -> Rows:
    conversion = Conversion(columns, "error")
    conversion.add_batches(pa.Table.from_pylist(list(rows)).to_batches(), "rows")
    return conversion.rows("rows")


both = pytest.mark.parametrize("convert", [from_json, from_arrow])


@both
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_system_prompt_beside_a_conversation_is_its_first_turn(name: str, convert: Any) -> None:
    rows = [
        {name: [SAY], "system": "Be brief", "tools": ""},
        {name: [SAY], "system": "", "tools": "[]"},
        {name: [SYSTEM, SAY], "system": "Be brief", "tools": None},
        {name: [SAY], "system": None, "tools": None},
    ]
    table = convert(*rows).table
    assert table["messages"].to_pylist() == [[SYSTEM, SAY], [SAY], [SYSTEM, SAY], [SAY]]
    assert table["system"].to_pylist() == [row["system"] for row in rows]  # to partition by


@both
def test_it_may_have_another_name(convert: Any) -> None:
    table = convert({"messages": [SAY], "persona": "Be brief"}, system="persona").table
    assert table["messages"].to_pylist() == [[SYSTEM, SAY]]


@both
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [SAY], "tools": "search"}, "has tools beside its messages that are no JSON objects with names"),
        ({"conversations": [SAY], "tools": ["search"]}, "has tools beside its conversations that are no JSON objects"),
        ({"messages": [SYSTEM, SAY], "system": "Be long"}, "has one system prompt in its column system and another"),
    ],
)
def test_what_would_be_lost_is_refused(row: dict[str, Any], said: str, convert: Any) -> None:
    with pytest.raises(DataError, match=f"^row(s row)? 1 {said}"):
        convert(row)
