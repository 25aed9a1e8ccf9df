"""Turns as OpenAI, ShareGPT, Glaive and TRL keep them: every key is read, or refused by a sentence that names it."""

import json
from typing import Any

import datasets
import pytest

from datasets_partition.core.turns import conversations
from datasets_partition.core.types import FULL_TURNS, TURNS, DataError
from datasets_partition.formats.conversion import Conversion
from tests.datasets_partition.conftest import both, from_arrow, from_json

SAY = {"role": "user", "content": "Say a"}
A = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def turns(*given: dict[str, Any], convert: Any = from_json, **how: Any) -> list[dict[str, Any]]:
    """What a chat template reads of one row's turns."""
    (conversation,) = conversations(convert({"messages": [*given]}, **how).table, "messages")
    return conversation.turns


@both
@pytest.mark.parametrize(
    ("role", "canonical"),
    [
        *((name, "user") for name in ("USER", "Human", "human", "prompter")),
        *((name, "assistant") for name in ("gpt", "bot", "model", "Assistant", "AI", "chatgpt")),
        *((name, "tool") for name in ("observation", "function", "ipython", "tool")),
        *((name, name) for name in ("system", "developer")),
    ],
)
def test_roles_of_all_dialects(role: str, canonical: str, convert: Any) -> None:
    assert turns({"from": role, "value": "x"}, convert=convert) == [{"role": canonical, "content": "x"}]


@both
def test_parts_of_text_are_joined(convert: Any) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "input_text", "text": "b"}]
    assert turns(SAY | {"content": parts}, convert=convert) == [{"role": "user", "content": "a b"}]


@both
def test_tool_calls_and_reasoning_are_what_a_template_reads(convert: Any) -> None:
    calling = {"role": "assistant", "content": None, "reasoning_content": "why", "tool_calls": [CALL]}
    assert turns(SAY, calling, RESULT, A, convert=convert) == [SAY, calling, RESULT, A]
    table = convert({"messages": [SAY, calling, RESULT, A]}).table
    assert table.schema.field("messages").type == FULL_TURNS
    assert convert({"messages": [SAY, A]}).table.schema.field("messages").type == TURNS


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"id": "1", "name": "f", "arguments": {"x": 1}}]},
        {"tool_calls": json.dumps([CALL])},
    ],
)
def test_the_dialects_of_a_tool_call(call: dict[str, Any]) -> None:
    assert turns(SAY, {"role": "assistant", "content": "", **call})[1]["tool_calls"] == [CALL]


@both
def test_function_calls_of_glaive_and_of_openai_before_tools(convert: Any) -> None:
    function = {"name": "f", "arguments": {"x": 1}}
    expected = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]
    glaive = [
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": json.dumps({"x": 1})})},
        {"from": "observation", "value": "3"},
    ]
    assert turns(*glaive, convert=convert) == [*expected, {"role": "tool", "content": "3"}]
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert turns(old, convert=convert) == expected


def test_json_keeps_a_null_argument_and_arrow_has_none() -> None:
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        for arguments in ({"x": None}, {"y": 2})
    ]
    read = [turn["tool_calls"][0]["function"]["arguments"] for turn in turns(*calls)]
    assert read == [{"x": None}, {"y": 2}]
    read = [turn["tool_calls"][0]["function"]["arguments"] for turn in turns(*calls, convert=from_arrow)]
    assert read == [{}, {"y": 2}]  # there all objects have the keys of all


@both
@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training"])
@pytest.mark.parametrize("value", [0, 0.0, False])
def test_a_turn_of_weight_0_is_not_learned(key: str, value: Any, convert: Any) -> None:
    if key == "train":
        value = bool(value)
    table = convert({"messages": [SAY, A | {key: value}, SAY, A | {key: type(value)(1)}]}).table
    (conversation,) = conversations(table, "messages")
    assert conversation.learned == [True, False, True, True]
    assert conversation.turns == [SAY, A, SAY, A]


@both
@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (A | {"weight": 0.5}, r"whose weight is neither 0 nor 1 \(it is 0\.5\)"),
        (A | {"train": "no"}, r"whose train is neither 0 nor 1 \(it is 'no'\)"),
        (SAY | {"weight": 1}, r"of the role user that weight = 1 asks to learn \(only .*leave_out = \[\"weight\"\]\)"),
        (A | {"lang": "en"}, r"with the key 'lang', which is not read \(leave it out with data\.source\.leave_out = "),
        (A | {"from": "gpt"}, "with the key 'from', which is not read"),
        (
            A | {"content": [{"type": "image", "text": "b"}]},
            r"with a part of its content that is no text \(it is of the type image",
        ),
        (
            A | {"content": [{"type": "text", "text": "b", "cache": "x"}]},
            "with a part of its content that has the key 'cache'",
        ),
        (A | {"tool_calls": [CALL | {"type": "web"}]}, "with a tool call of the type 'web', not function"),
        (A | {"tool_calls": [CALL | {"result": "3"}]}, "with a tool call that has the key 'result', which is not read"),
        (
            A | {"tool_calls": [{"function": {"name": "f", "arguments": "x="}}]},
            "with a tool call whose arguments are no JSON object",
        ),
        (A | {"role": "function_call"}, "with a tool call that is no object with name and arguments"),
        (A | {"content": None}, "whose content is no text"),
        (A | {"reasoning_content": 7}, "whose reasoning_content is no text"),
        (A | {"role": "critic"}, r"whose role is none of system, .*\(it is 'critic'; others that are read: ai, bot"),
    ],
)
def test_what_is_not_read_is_refused_by_name(turn: dict[str, Any], reason: str, convert: Any) -> None:
    with pytest.raises(DataError, match=rf"row 1 has a turn in its messages {reason}"):
        convert({"messages": [turn]})


@both
def test_keys_without_a_value_and_keys_to_leave_out_are_passed_over(convert: Any) -> None:
    turn = A | {"weight": None, "refusal": None, "annotations": [], "lang": "", "tool_calls": []}
    assert turns(SAY, turn, convert=from_json) == [SAY, A]
    turn = A | {"lang": "en", "reasoning_content": "why", "weight": 0}
    table = convert({"messages": [SAY, turn]}, leave_out=("lang", "reasoning_content", "weight")).table
    assert table["messages"].to_pylist() == [[SAY, A]]


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_turns_as_json_text_and_as_columns(name: str) -> None:
    for convert in (from_json, from_arrow):
        assert convert({name: json.dumps([SAY, A])}).table["messages"].to_pylist() == [[SAY, A]]
        columns = {"role": ["user", "assistant"], "content": ["Say a", "a"]}
        assert convert({name: columns}).table["messages"].to_pylist() == [[SAY, A]]
        with pytest.raises(DataError, match=rf"no list of turns as its {name} \(it is str; text must be JSON of such"):
            convert({name: "[{'role': 'user', 'content': 'Say a'}]"})


def test_what_the_datasets_library_makes_of_json() -> None:
    rows = {"messages": [[SAY, A | {"tool_calls": [CALL]}]], "tools": [[TOOL]]}
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.List(datasets.Json())})
    conversion = Conversion({}, "error")
    conversion.add_batches(datasets.Dataset.from_dict(rows, features).data.table.to_batches(), "rows")
    (conversation,) = conversations(conversion.rows("rows").table, "messages")
    assert conversation.turns == [SAY, A | {"tool_calls": [CALL]}]
    assert conversation.options == {"tools": [TOOL]}


@both
@pytest.mark.parametrize(
    "beside",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]]},
    ],
)
def test_tools_are_what_a_template_takes(beside: dict[str, Any], convert: Any) -> None:
    for row in ({"messages": [SAY, A]}, {"prompt": [SAY], "completion": [A]}):
        (conversation,) = conversations(convert(row | beside).table, "messages")
        assert conversation.options == {"tools": [TOOL]}
    table = convert({"prompt": [SAY], "chosen": [A], "rejected": [SAY]} | beside).table
    (conversation,) = conversations(table, "prompt")
    assert conversation.options == {"tools": [TOOL]}


@both
def test_arguments_of_templates_and_what_stores_hold_are_read(convert: Any) -> None:
    row = {"messages": [SAY, A | {"weight": 0, "thinking": "why"}], "chat_template_kwargs": {"enable_thinking": False}}
    table = convert(row | {"tools": []}).table
    (conversation,) = conversations(table, "messages")
    assert conversation.options == {"enable_thinking": False}
    again = convert(*table.select(["messages", "template_options"]).to_pylist()).table
    assert conversations(again, "messages") == [conversation]


def test_rows_with_and_without_tools_are_one_table() -> None:
    table = from_json({"messages": [SAY, A]}, {"messages": [SAY, A], "tools": [TOOL]}).table
    assert [conversation.options for conversation in conversations(table, "messages")] == [{}, {"tools": [TOOL]}]
