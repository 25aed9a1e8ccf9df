"""Columns other than the content, by which rows may be partitioned: values of any kind as Arrow columns."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

WHOLE = 2**53  # up to here floats represent every whole number
# Raised by Arrow for values or columns without a common type.
NO_COMMON_TYPE = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


def array_of(values: list[Any]) -> pa.Array | pa.ChunkedArray:
    """Python values, as in JSON, in the Arrow type that they share; as text if they share none or are objects."""
    try:
        if not any(isinstance(value, dict) for value in values):
            return pa.array(values)
    except NO_COMMON_TYPE:
        pass
    return pa.array([as_text(value) for value in values], pa.string())


def as_text(value: Any) -> str | None:
    """A string unchanged, null and NaN as null, and anything else as JSON; 1.0 is written as 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < WHOLE:
        value = int(value)
    if value != value:
        return None
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def nan_is_null(values: pa.Array) -> pa.Array:
    """The same values, with null for NaN among floats: pandas writes missing values as NaN."""
    return pc.if_else(pc.is_nan(values), None, values) if pa.types.is_floating(values.type) else values


def joined(tables: list[pa.Table]) -> pa.Table:
    """All rows of all tables: null where a table lacks a column, text where columns share no type."""
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables)
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    return pa.table({name: _joined_column([_column(table, name) for table in tables]) for name in names})


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    return table[name] if name in table.column_names else pa.chunked_array([pa.nulls(table.num_rows)])


def _joined_column(parts: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    try:
        tables = [pa.table({"values": part}) for part in parts]
        return pa.concat_tables(tables, promote_options="permissive")["values"]
    except NO_COMMON_TYPE:
        texts = (pa.array([as_text(value) for value in part.to_pylist()], pa.string()) for part in parts)
        return pa.chunked_array(list(texts))
