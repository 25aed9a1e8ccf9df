"""Every form of row, from JSON and from Arrow, against what it becomes; implicit prompts against TRL's."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import extract_prompt

from datasets_partition.core.types import TURNS, DataError, Rows
from datasets_partition.formats.conversion import Conversion
from datasets_partition.formats.forms import shared

SAY = {"role": "user", "content": "Say a"}
A = {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be brief"}

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"
)

# What a row is, and what it becomes.
GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"text": "a"}, {"prompt": "", "completion": "a"}),
    ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": ""}),
    ({"prompt": "a"}, {"prompt": "a"}),
    ({"prompt": [SYSTEM, SAY]}, {"prompt": [SYSTEM, SAY]}),
    ({"instruction": "Add", "output": "3"}, {"prompt": ALPACA, "completion": "3"}),
    ({"instruction": "Add", "input": "", "output": "3"}, {"prompt": ALPACA, "completion": "3"}),
    ({"instruction": "Add", "input": None, "output": "3"}, {"prompt": ALPACA, "completion": "3"}),
    (
        {"instruction": "Add", "input": "1 2", "output": "3", "text": "x"},
        {"prompt": ALPACA_INPUT, "completion": "3", "text": "x"},
    ),
    ({"messages": [SYSTEM, SAY, A]}, {"messages": [SYSTEM, SAY, A]}),
    ({"messages": [SAY, A], "prompt": "Say a"}, {"messages": [SAY, A], "source_prompt": "Say a"}),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "h"},
                {"from": "gpt", "value": "g"},
            ]
        },
        {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "h"), ("assistant", "g"))]},
    ),
    ({"conversations": [SAY, {"role": "tool", "content": "1"}]}, {"messages": [SAY, {"role": "tool", "content": "1"}]}),
    ({"prompt": [SYSTEM, SAY], "completion": [A]}, {"messages": [SYSTEM, SAY, A]}),
    ({"prompt": "a", "completion": "b", "label": False}, {"prompt": "a", "completion": "b", "label": False}),
    (
        {"prompt": [SAY, A, SAY], "completion": [A], "label": True},
        {"prompt": [SAY, A, SAY], "completion": [A], "label": True},
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ({"chosen": "Q: a", "rejected": "Q: b"}, {"prompt": "Q:", "chosen": " a", "rejected": " b"}),
    ({"chosen": [SAY, A], "rejected": [SAY, B]}, {"prompt": [SAY], "chosen": [A], "rejected": [B]}),
    ({"prompt": "Say a", "chosen": [SAY, A], "rejected": [SAY, B]}, {"prompt": [SAY], "chosen": [A], "rejected": [B]}),
    ({"prompt": [SAY], "chosen": [A], "rejected": [B]}, {"prompt": [SAY], "chosen": [A], "rejected": [B]}),
    ({"prompt": "a", "completion": "b", "label": "news"}, {"prompt": "a", "completion": "b", "label": "news"}),
    ({"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b", "label": 1}),
    ({"text": "a", "label": True}, {"prompt": "", "completion": "a", "label": "true"}),
]

BAD: list[tuple[dict[str, Any], str]] = [
    ({"text": None}, "has a null text"),
    ({"prompt": None, "completion": "b"}, "has a null prompt"),
    ({"prompt": "a", "completion": None}, "has a null completion"),
    ({"instruction": None, "output": "b"}, "has a null instruction"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "has a null rejected"),
    ({"chosen": None, "rejected": "a"}, "has a null chosen"),
    ({"messages": None}, "has null messages"),
    ({"messages": []}, "has empty messages"),
    ({"conversations": []}, "has empty conversations"),
    ({"messages": ["a"]}, "has a turn in its messages that is no object with role and content"),
    ({"messages": [SAY, None]}, "has a turn in its messages that is no object with role and content"),
    ({"messages": [SAY | {"content": None}]}, "has a turn in its messages whose content is no text"),
    ({"messages": [SAY | {"role": "cat"}]}, "has a turn in its messages whose role is none of system, "),
    ({"messages": [{"content": "a"}]}, "has a turn in its messages whose role is none of system, "),
    (
        {"messages": [SAY, A | {"tool_calls": [{"id": "1"}]}]},
        "has a turn in its messages with a tool call that is no object",
    ),
    ({"prompt": "a", "completion": [A]}, "has text and turns side by side in prompt, completion"),
    ({"chosen": [SAY, A], "rejected": "b"}, "has text and turns side by side in chosen, rejected"),
    ({"chosen": [A], "rejected": [B]}, "has no turn that chosen and rejected share, to be the prompt"),
]
# Only JSON can say these; in Arrow a column has one type, which is checked as a whole.
BAD_JSON: list[tuple[dict[str, Any], str]] = [
    ({"text": 1}, "has no text as its text"),
    ({"messages": "hello"}, "has no list of turns as its messages"),
    ({"messages": {"role": "user"}}, "has no list of turns as its messages"),
    ({"messages": [SAY | {"role": ["user"]}]}, "has a turn in its messages whose role is none of"),
    ({"prompt": "a", "text": "b"}, "fits no format"),
    ({"prompt": "a", "instruction": "b", "output": "c"}, "fits no format"),
    ({"chosen": "a"}, "fits no format"),
    ({"question": "a"}, "fits no format"),
    ({}, "fits no format"),
]


def from_json(*rows: dict[str, Any], skip: bool = False, **columns: str) -> Rows:
    conversion = Conversion(columns, "skip" if skip else "error")
    conversion.add_objects([(f"row {number}", row) for number, row in enumerate(rows, 1)])
    return conversion.rows("rows")


def from_arrow(*rows: dict[str, Any], skip: bool = False, **columns: str) -> Rows:
    conversion = Conversion(columns, "skip" if skip else "error")
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in rows[0]})
    conversion.add_batches(table.to_batches(), "rows")
    return conversion.rows("rows")


@pytest.mark.parametrize("convert", [from_json, from_arrow])
@pytest.mark.parametrize(("row", "expected"), GOOD)
def test_every_form_becomes_canonical(row: dict[str, Any], expected: dict[str, Any], convert: Any) -> None:
    table, skipped = convert(row | {"client": 7, "weight": 0.5})
    assert table.to_pylist() == [{"client": "7", **expected, "weight": 0.5}]
    assert table.column_names[: 1 + len(expected)] == ["client", *expected]
    assert skipped == {}
    types = {str: pa.string(), list: TURNS, bool: pa.bool_(), int: pa.int64()}
    assert [table.schema.field(name).type for name in expected] == [types[type(v)] for v in expected.values()]


@pytest.mark.parametrize("convert", [from_json, from_arrow])
@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_are_named_and_counted(row: dict[str, Any], reason: str, convert: Any) -> None:
    way_out = r'correct it, or leave such rows out with data\.source\.on_bad_row = "skip"'
    with pytest.raises(DataError, match=f"^(rows )?row 1 {reason}.*: {way_out}$"):
        convert(row)
    with pytest.raises(DataError, match=rf"^rows has no rows that can be used \(2 {reason}.*\): give data\.source"):
        convert(row, row, skip=True)


@pytest.mark.parametrize("convert", [from_json, from_arrow])
def test_good_rows_stay_when_bad_ones_are_skipped(convert: Any) -> None:
    pairs = [("a", "b"), (None, "c"), ("d", None), ("e", "f"), (None, None)]
    table, skipped = convert(*({"prompt": p, "completion": c, "n": n} for n, (p, c) in enumerate(pairs)), skip=True)
    assert table["n"].to_pylist() == [0, 3]
    assert skipped == {"has a null prompt": 2, "has a null completion": 1}
    conversations = [[SAY, A], [], [SAY], None]
    table, skipped = convert(*({"messages": turns, "n": n} for n, turns in enumerate(conversations)), skip=True)
    assert table["n"].to_pylist() == [0, 2]
    assert skipped == {"has empty messages": 1, "has null messages": 1}


@pytest.mark.parametrize(("row", "reason"), BAD_JSON)
def test_json_can_hold_anything(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"^row 2 {reason}"):
        from_json({"text": "a"}, row)
    assert sum(from_json({"text": "a"}, row, skip=True).skipped.values()) == 1


def test_an_error_for_an_unknown_format_names_the_columns() -> None:
    expected = (
        r"its columns are question \(str\), n \(null\); it needs text; messages; prompt and completion; .*alone\)"
    )
    with pytest.raises(DataError, match=rf"^row 1 fits no format \({expected}"):
        from_json({"question": "a", "n": None})
    with pytest.raises(DataError, match=r"^rows has the columns question, n, which fit no format: name yours in "):
        from_arrow({"question": "a", "n": 1})


def test_a_column_that_can_hold_no_content_is_an_error_as_a_whole() -> None:
    with pytest.raises(DataError, match=r"^rows has int64 in its column text, which must hold text or turns: convert"):
        from_arrow({"text": 1}, skip=True)
    with pytest.raises(DataError, match=r"^rows has struct<a: int64> in its column client, which must hold text or n"):
        from_arrow({"text": "a", "client": {"a": 1}}, skip=True)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (
            {"prompt": "question", "completion": "answer"},
            {"question": "a", "answer": "b"},
            {"prompt": "a", "completion": "b"},
        ),
        (
            {"prompt": "completion", "completion": "prompt"},
            {"prompt": "a", "completion": "b"},
            {"prompt": "b", "completion": "a"},
        ),
        (
            {"prompt": "question"},
            {"question": "a", "prompt": "x", "completion": "b"},
            {"prompt": "a", "completion": "b", "source_prompt": "x"},
        ),
        ({"text": "text"}, {"text": "a", "prompt": "b"}, {"prompt": "", "completion": "a", "source_prompt": "b"}),
        (
            {"messages": "messages"},
            {"messages": [SAY], "chosen": "a", "rejected": "b"},
            {"messages": [SAY], "source_chosen": "a", "source_rejected": "b"},
        ),
        ({"client": "author"}, {"text": "a", "author": 3}, {"client": "3", "prompt": "", "completion": "a"}),
    ],
)
@pytest.mark.parametrize("convert", [from_json, from_arrow])
def test_columns_rename_and_decide(columns: dict[str, str], row: Any, expected: Any, convert: Any) -> None:
    assert convert(row, **columns).table.to_pylist() == [expected]


def test_columns_that_are_not_there() -> None:
    with pytest.raises(
        DataError, match=r"^data.source.columns.prompt names 'q', which rows does not have: name one of a, b"
    ):
        from_arrow({"a": "x", "b": "y"}, prompt="q")
    with pytest.raises(
        DataError, match=r"^row 1 has no column 'q', which data.source.columns names \(its columns are a"
    ):
        from_json({"a": "x"}, prompt="q")


@pytest.mark.parametrize("convert", [from_json, from_arrow])
@pytest.mark.parametrize("client", [None, ""])
def test_a_row_without_a_client_among_others(convert: Any, client: Any) -> None:
    rows = ({"text": "a", "client": "x"}, {"text": "b", "client": client})
    with pytest.raises(DataError, match="row 2 has a null or empty client: correct it"):
        convert(*rows)
    table, skipped = convert(*rows, skip=True)
    assert (table["client"].to_pylist(), skipped) == (["x"], {"has a null or empty client": 1})


def test_json_rows_of_several_forms_but_one_format_mix() -> None:
    table, _ = from_json({"text": "a"}, {"prompt": "b", "completion": "c"}, {"instruction": "Add", "output": "3"})
    assert table["completion"].to_pylist() == ["a", "c", "3"]
    with pytest.raises(
        DataError, match=r"row 2 is of another format .* \(messages of turns, not prompt_completion of text\)"
    ):
        from_json({"text": "a"}, {"messages": [SAY]})
    with pytest.raises(
        DataError, match=r"row 2 is of another format .* \(prompt_only of turns, not prompt_only of text\)"
    ):
        from_json({"prompt": "a"}, {"prompt": [SAY]})
    for rows, has in (
        (({"text": "a"}, {"text": "b", "client": "x"}), "a"),
        (({"text": "b", "client": 1}, {"text": "a"}), "no"),
    ):
        with pytest.raises(DataError, match=f"row 2 has {has} client, unlike the rows before it"):
            from_json(*rows)


def test_no_rows_at_all() -> None:
    with pytest.raises(DataError, match=r"^rows has no rows: give data\.source something that has"):
        from_json()
    with pytest.raises(
        DataError, match=r"^rows has no rows that can be used \(2 has a null text; 1 fits no format\): give"
    ):
        from_json({}, {"text": None}, {"text": None}, skip=True)


TEXTS = st.text(alphabet="ab \n", max_size=8)
TURNS_OF = st.lists(st.builds(lambda content: {"role": "user", "content": content}, TEXTS), min_size=1, max_size=4)


@given(prompt=TEXTS.filter(bool), chosen=TEXTS, rejected=TEXTS)
def test_an_implicit_prompt_is_trls(prompt: str, chosen: str, rejected: str) -> None:
    # TRL itself fails on empty text, and looks at the text's end where nothing is shared.
    chosen, rejected = prompt + chosen, prompt + rejected
    cut = shared(chosen, rejected)
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert theirs == {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


@given(chosen=TURNS_OF, rejected=TURNS_OF)
def test_an_implicit_conversation_is_trls(chosen: list[Any], rejected: list[Any]) -> None:
    cut = shared(chosen, rejected)
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert theirs == {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


@pytest.mark.parametrize(("chosen", "rejected"), [("", ""), ("", "a"), ("a ", "b"), ([], [])])
def test_where_trl_has_no_answer_nothing_is_shared(chosen: Any, rejected: Any) -> None:
    assert shared(chosen, rejected) == 0


CELL = st.none() | TEXTS


@given(
    rows=st.sampled_from(
        [
            ("text",),
            ("prompt", "completion"),
            *(("instruction", "input", "output"), ("prompt", "chosen", "rejected"), ("prompt",)),
        ]
    ).flatmap(lambda names: st.lists(st.fixed_dictionaries({"client": CELL} | dict.fromkeys(names, CELL)), min_size=1))
)
def test_both_ways_give_the_same(rows: list[dict[str, Any]]) -> None:
    def outcome(convert: Any) -> Any:
        try:
            table, skipped = convert(*rows, skip=True)
        except ValueError as error:
            return str(error)
        return table.to_pylist(), skipped

    assert outcome(from_json) == outcome(from_arrow)
