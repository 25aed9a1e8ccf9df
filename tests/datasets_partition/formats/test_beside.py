"""Columns beside prompts: Alpaca's system and history, a mapped system prompt, a prompt of several turns."""

import json
from typing import Any

import pytest

from datasets_partition.core.turns import conversations
from datasets_partition.core.types import DataError, format_of
from tests.datasets_partition.conftest import both

SAY = {"role": "user", "content": "Say a"}
A = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "Be brief"}
ALPACA = {"instruction": "And Bern?", "input": "", "output": "Rainy."}
BEGINS = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@both
@pytest.mark.parametrize(
    ("beside", "begins", "earlier"),
    [
        ({"system": "One word."}, "One word.", ""),
        ({"history": [["Zurich?", "Sunny."]]}, BEGINS, "\n\n### Instruction:\nZurich?\n\n### Response:\nSunny."),
        ({"history": '[["Zurich?", "Sunny."]]'}, BEGINS, "\n\n### Instruction:\nZurich?\n\n### Response:\nSunny."),
        ({"system": "", "history": []}, BEGINS, ""),
        ({"system": None, "history": None}, BEGINS, ""),
    ],
)
def test_alpacas_system_and_history_are_in_the_prompt(beside: Any, begins: str, earlier: str, convert: Any) -> None:
    table = convert(ALPACA | beside).table
    prompt = f"{begins}{earlier}\n\n### Instruction:\nAnd Bern?\n\n### Response:\n"
    assert table["prompt"].to_pylist() == [prompt] and table["completion"].to_pylist() == ["Rainy."]


@both
@pytest.mark.parametrize("history", ["Zurich?", ["Zurich?"], [["Zurich?"]], '[["Zurich?", 1]]'])
def test_a_history_of_another_kind_is_refused(history: Any, convert: Any) -> None:
    with pytest.raises(DataError, match=r'row 1 has a history that is no list .*leave_out = \["history"\]'):
        convert(ALPACA | {"history": history})
    table = convert(ALPACA | {"history": history}, leave_out=("history",)).table
    assert "history" in table.column_names and table["prompt"].to_pylist()[0].startswith(BEGINS)


@both
def test_a_mapped_system_prompt_makes_a_conversation(convert: Any) -> None:
    row = {"id": "a", "system_prompt": "Be brief", "question": "Say a", "response": "a"}
    columns = {"prompt": "question", "completion": "response"}
    table = convert(row, **columns, system="system_prompt").table
    assert table["messages"].to_pylist() == [[SYSTEM, SAY, A]]
    assert convert(row | {"system_prompt": ""}, **columns, system="system_prompt").table["messages"].to_pylist() == [
        [SAY, A]
    ]
    assert convert(row, **columns).table["system_prompt"].to_pylist() == ["Be brief"], "kept for the partition"
    turns = {"prompt": [SAY], "completion": [A], "s": "Be brief"}
    assert convert(turns, system="s").table["messages"].to_pylist() == [[SYSTEM, SAY, A]]
    pair = {"prompt": "Say a", "chosen": "a", "rejected": "b", "s": "Be brief"}
    (row,) = convert(pair, system="s").table.select(["prompt", "chosen", "rejected"]).to_pylist()
    assert row == {"prompt": [SYSTEM, SAY], "chosen": [A], "rejected": [A | {"content": "b"}]}


@both
@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a", "s": "b"}, {"system": "s"}),
        ({"prompt": "a", "completion": "b", "s": "c"}, {"history": "s"}),
        ({"messages": [SAY, A], "s": "c"}, {"input": "s"}),
    ],
)
def test_a_mapping_that_nothing_reads_is_an_error(row: Any, columns: dict[str, str], convert: Any) -> None:
    (name,) = columns
    with pytest.raises(DataError, match=rf"^data\.source\.columns\.{name} is not read beside \w+.*, only "):
        convert(row, **columns)


@both
def test_of_a_prompt_of_several_turns_the_completion_alone_is_learned(convert: Any) -> None:
    table = convert({"prompt": [SAY, A, SAY], "completion": [A]}).table
    (conversation,) = conversations(table, "messages")
    assert conversation.turns == [SAY, A, SAY, A]
    assert conversation.learned == [True, False, True, True]


@both
def test_preferences_keep_all_of_their_turns(convert: Any) -> None:
    calling = A | {"reasoning_content": "why"}
    pair = convert({"prompt": [SAY, A, SAY], "chosen": [calling], "rejected": [A]}).table
    assert format_of(pair) == "preference"
    assert [turn["more"] for turn in pair["chosen"].to_pylist()[0]] == [json.dumps({"reasoning_content": "why"})]
    implicit = convert({"chosen": [SAY, calling], "rejected": [SAY, A]}).table
    assert conversations(implicit, "chosen")[0].turns == [calling]
    unpaired = convert({"prompt": [SAY], "completion": [calling], "label": True}).table
    assert format_of(unpaired) == "unpaired_preference" and conversations(unpaired, "completion")[0].turns == [calling]


@both
def test_a_prompt_beside_conversations_repeats_a_turn_or_is_left_out(convert: Any) -> None:
    pair = {"prompt": "Another", "chosen": [SAY, A], "rejected": [SAY, A | {"content": "b"}]}
    with pytest.raises(DataError, match=r'has a prompt that is no turn which .* \(it .*leave_out = \["prompt"\]\)'):
        convert(pair)
    table = convert(pair, leave_out=("prompt",)).table
    assert table["prompt"].to_pylist() == [[SAY]] and table["source_prompt"].to_pylist() == ["Another"]
