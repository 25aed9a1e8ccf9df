"""Rows with the same content: the first of each, and those that lie on both sides of a split."""

import json

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.errors import DataError


def content_numbers(table: pa.Table, columns: tuple[str, ...]) -> NDArray[np.int64]:
    """A number for each row, equal where and only where rows agree in all `columns`: compared, not hashed."""
    numbers = np.zeros(table.num_rows, dtype=np.int64)
    contents = 1
    for name in columns:
        if contents == len(numbers):
            break  # all rows differ already
        values = table[name].combine_chunks()
        if pa.types.is_nested(values.type):
            values = pa.array([json.dumps(value) for value in values.to_pylist()], pa.large_string())
        codes, different = _coded(values)
        if contents > 1 and different > 1:
            # Both are at most the number of rows, so that the product does not overflow.
            codes, different = _coded(pa.array(numbers * different + codes))
        if different > 1:
            numbers, contents = codes, different
    return numbers


def _coded(values: pa.Array) -> tuple[NDArray[np.int64], int]:
    """The number of each row's value, and how many values differ."""
    encoded = values.dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)


def first_of_each(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the first row of each content, ascending."""
    return np.sort(np.unique(numbers, return_index=True)[1])


def refuse_leaks(
    table: pa.Table, numbers: NDArray[np.int64], trained: NDArray[np.bool_], columns: tuple[str, ...]
) -> None:
    """Raises DataError if a row that is not `trained` has the content of a row that is."""
    leaking = np.flatnonzero(~trained & np.isin(numbers, numbers[trained]))
    if len(leaking):
        example = " | ".join(str(table[name][int(leaking[0])].as_py()) for name in columns)
        raise DataError(
            f"{len(leaking)} held-out rows have the content of training rows, such as {example[:80]!r}: remove them by "
            f'data.splits.duplicates = "drop", or accept the leak by data.splits.leaks = "allow"'
        )
