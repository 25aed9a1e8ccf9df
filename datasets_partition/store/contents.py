"""Rows with the same content or the same prompt: their numbers, and the error for those on both sides of a split."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.types import MESSAGES, DataError, content_columns

CONTENT_LEAK = (
    "{count} held-out rows have the content of training rows, such as {example!r}: remove them by "
    'data.splits.duplicates = "drop", or accept the leak by data.splits.leaks = "allow"'
)
PROMPT_LEAK = (
    "{count} rows of unseen clients have the prompt of training rows, such as {example!r}: set data.splits.unseen = 0, "
    'take a partition that draws, such as kind = "iid", or accept the leak by data.splits.leaks = "allow"'
)


def content_numbers(table: pa.Table, columns: tuple[str, ...]) -> NDArray[np.int64]:
    """A number for each row, equal where and only where rows agree in all `columns`: compared, not hashed."""
    numbers, contents = np.zeros(table.num_rows, dtype=np.int64), 1
    for name in columns:
        if contents == len(numbers):
            break  # all rows differ already
        values = table[name].combine_chunks()
        if pa.types.is_nested(values.type):
            values = pa.array([json.dumps(value) for value in values.to_pylist()], pa.large_string())
        codes, different = coded(values)
        # Both are at most the number of rows, so that the product does not overflow.
        numbers, contents = coded(pa.array(numbers * different + codes))
    return numbers


def prompt_numbers(table: pa.Table) -> NDArray[np.int64]:
    """A number for each row, equal where and only where rows have the same prompt; an empty prompt is no other row's.

    The prompt of a conversation is all turns before the assistant's last; what may be learned of it does not count.
    """
    name = content_columns(table)[0]
    values = table[name].combine_chunks()
    if pa.types.is_nested(values.type):
        turns = values.to_pylist()
        prompts = map(_before_answer, turns) if name == MESSAGES else turns
        values = pa.array([_as_text(prompt) for prompt in prompts], pa.large_string())
    numbers, different = coded(values)
    alone = pc.equal(values, "").to_numpy(zero_copy_only=False)
    numbers[alone] = different + np.arange(np.count_nonzero(alone))
    return numbers


def _before_answer(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    return turns[: answers[-1]] if answers else turns


def _as_text(turns: list[dict[str, Any]]) -> str:
    return json.dumps([(turn["role"], turn["content"], turn.get("more")) for turn in turns]) if turns else ""


def paired(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each row, equal where and only where rows agree in both of their numbers."""
    return coded(pa.array(first * (second.max(initial=0) + 1) + second))[0]


def coded(values: pa.Array) -> tuple[NDArray[np.int64], int]:
    """The number of each row's value, and how many values differ."""
    encoded = values.dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)


def first_of_each(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the first row of each content, ascending."""
    return np.sort(np.unique(numbers, return_index=True)[1])


def refuse_leaks(
    table: pa.Table, numbers: NDArray[np.int64], trained: NDArray[np.bool_], columns: tuple[str, ...], leak: str
) -> None:
    """Raises DataError, with the text `leak`, if a row that is not `trained` has the number of a row that is."""
    leaking = np.flatnonzero(~trained & np.isin(numbers, numbers[trained]))
    if len(leaking):
        example = " | ".join(str(table[name][int(leaking[0])].as_py()) for name in columns)
        raise DataError(leak.format(count=len(leaking), example=example[:80]))
