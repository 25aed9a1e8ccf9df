"""Rows with the same content: which is the first of its kind, and which lie on both sides of a split."""

import json

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def content_numbers(table: pa.Table, columns: tuple[str, ...]) -> NDArray[np.int64]:
    """A number for each row, equal where and only where rows agree in all `columns`: compared, not hashed."""
    numbers = np.zeros(table.num_rows, dtype=np.int64)
    contents = 1
    for name in columns:
        if contents == len(numbers):
            break  # each row is the only one of its content
        values = table[name].combine_chunks()
        if pa.types.is_nested(values.type):
            values = pa.array([json.dumps(value) for value in values.to_pylist()], pa.large_string())
        codes, found = _coded(values)
        if contents > 1 and found > 1:
            # Below the number of rows each, so that the product does not overflow.
            codes, found = _coded(pa.array(numbers * found + codes))
        if found > 1:
            numbers, contents = codes, found
    return numbers


def _coded(values: pa.Array) -> tuple[NDArray[np.int64], int]:
    """The number of each row's value, and how many there are."""
    encoded = values.dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)


def first_of_each(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the first row of each content, ascending."""
    return np.sort(np.unique(numbers, return_index=True)[1])


def refuse_leaks(
    table: pa.Table, numbers: NDArray[np.int64], trained: NDArray[np.bool_], columns: tuple[str, ...]
) -> None:
    """Raises ValueError if a row that is not `trained` has the content of one that is."""
    leaking = np.flatnonzero(~trained & np.isin(numbers, numbers[trained]))
    if len(leaking):
        example = " | ".join(str(table[name][int(leaking[0])].as_py()) for name in columns)
        raise ValueError(
            f"{len(leaking)} held-out rows have the content of training rows, such as {example[:80]!r}: remove them by "
            f'data.splits.duplicates = "drop", or accept the leak by data.splits.leaks = "allow"'
        )
