"""Columns as partitioners read them, with errors that name the recipe's `key`; and Python values as columns."""

import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.types import DataError, content_columns

# The canonical column that a column of the source has become (see forms.py).
KEPT_IN = dict(text="completion", output="completion", instruction="prompt", input="prompt", conversations="messages")
SHOWN = 160  # letters of a row that an error shows
WHOLE = 2**53  # up to here floats represent every whole number
NO_COMMON_TYPE = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)  # raised by Arrow


class Coded(NamedTuple):
    """A column of few values: the number of each row's value, and the values by number, as text."""

    codes: NDArray[np.int32]
    values: pa.StringArray

    def texts(self) -> pa.Array:
        """The value of each row."""
        return self.values.take(pa.array(self.codes))


def column(table: pa.Table, key: str, name: str) -> pa.ChunkedArray:
    """The column `name`. Raises DataError, with the names of all columns, if it is missing."""
    if name not in table.column_names:
        kept = KEPT_IN.get(name)
        kept_in = f" (a source's {name} is kept in {kept})" if kept in table.column_names else ""
        without = ', or use kind = "iid"' if key.startswith("data.partition.") else ", or leave it out"
        raise DataError(
            f"{key} names {name!r}, which the rows do not have{kept_in}: "
            f"name one of {', '.join(table.column_names)}{without}"
        )
    return table[name]


def keys(table: pa.Table, key: str, name: str) -> Coded:
    """A column of clients, in the order of their names. Raises DataError where it is missing, null or empty."""
    return labels(table, key, name, by_text=True)


def labels(table: pa.Table, key: str, name: str, by_text: bool = False) -> Coded:
    """A column of labels, in the order of their values, 2 before 10, or of their texts. DataError as in `keys`."""
    cells = column(table, key, name)
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if pa.types.is_nested(cells.type):
        raise DataError(f"{key} names {name!r}, which holds {cells.type}: name text or numbers")
    encoded = cells.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy()
    try:
        names = nan_is_null(encoded.dictionary).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{key} names {name!r}, which holds {cells.type} that is not all text: "
            "save the column as UTF-8 text or as numbers, or name another one"
        ) from None
    is_empty = np.append(pc.fill_null(pc.equal(names, ""), True).to_numpy(zero_copy_only=False), True)
    if len(nameless := np.flatnonzero(is_empty[codes])):
        # Its content names the row: a number would count in the file, and duplicates have been dropped since.
        (first,) = table.slice(int(nameless[0]), 1).to_pylist()
        raise DataError(
            f"{key} names {name!r}, which is null or empty in {len(nameless)} of {table.num_rows} rows: "
            f"fill it in, or leave those rows out of the source; the first is {str(first)[:SHOWN]}"
        )
    order = pc.array_sort_indices(names if by_text else encoded.dictionary)
    return Coded(np.argsort(order.to_numpy()).astype(np.int32)[codes], names.take(order))


def numbers(table: pa.Table, key: str, name: str) -> NDArray[np.float64]:
    """A column of finite numbers, or of text that is numbers. Raises DataError where it holds anything else."""
    values = column(table, key, name)
    try:
        floats = values.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{key} names {name!r}, which holds {values.type} that are not all numbers: name a column of numbers"
        ) from None
    array: NDArray[np.float64] = pc.fill_null(floats, float("nan")).to_numpy()
    if bad := int(np.count_nonzero(~np.isfinite(array))):
        raise DataError(
            f"{key} names {name!r}, which is null or not finite in {bad} of {table.num_rows} rows: "
            "fill it in, or leave those rows out of the source"
        )
    return array


def texts(table: pa.Table, names: tuple[str, ...] | None) -> list[pa.ChunkedArray]:
    """The texts of columns of strings or turns, or of a row's content; null is no text. DataError for other columns."""
    if names is None:
        names = tuple(name for name in content_columns(table) if table.schema.field(name).type != pa.bool_())
    columns = []
    for name in names:
        values = column(table, "data.partition.columns", name)
        kind = values.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns.append(pc.fill_null(values.cast(pa.large_string()), ""))
        elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
            columns.append(pa.chunked_array([_contents(chunk) for chunk in values.chunks], pa.large_string()))
        else:
            raise DataError(f"data.partition.columns names {name!r}, which holds {kind}: name columns of text")
    return columns


def _contents(turns: pa.Array) -> pa.Array:
    """The content of each row's turns, joined."""
    contents = pc.fill_null(pc.struct_field(pc.list_flatten(turns), "content").cast(pa.large_string()), "")
    lengths = pc.fill_null(pc.list_value_length(turns), 0).to_numpy(zero_copy_only=False)
    offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
    return pc.binary_join(pa.LargeListArray.from_arrays(offsets, contents), pa.scalar("\n", pa.large_string()))


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


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this type are lists, of any or of one length."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def joined(tables: list[pa.Table]) -> pa.Table:
    """All rows of all tables: null where a table lacks a column, text where columns share no type."""
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        parts = [table.select([name]) for table in tables if name in table.column_names]
        try:
            pa.concat_tables(parts, promote_options="permissive")
        except NO_COMMON_TYPE:
            tables = [_with_text(table, name) if name in table.column_names else table for table in tables]
    return pa.concat_tables(tables, promote_options="permissive")


def _with_text(table: pa.Table, name: str) -> pa.Table:
    texts = pa.array([as_text(value) for value in table[name].to_pylist()], pa.string())
    return table.set_column(table.column_names.index(name), name, texts)
