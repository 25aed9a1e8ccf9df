"""Columns of one Arrow batch, made canonical: renamed, in plain types, and without bad rows."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.core.columns import nan_is_null
from datasets_partition.core.errors import DataError
from datasets_partition.formats.forms import Form
from datasets_partition.formats.turns import BadRow

CLASSES = "ClassLabel"
Faults = dict[int, BadRow]  # by the row's position in its batch


def renamed(batch: pa.RecordBatch, columns: dict[str, str], file: str) -> pa.RecordBatch:
    """The columns with their canonical names, in plain types. Raises DataError where `columns` names a missing one."""
    has = batch.schema.names
    if twice := sorted({name for name in has if has.count(name) > 1}):
        raise DataError(f"{file} has more than one column {', '.join(twice)}: rename all but one of them")
    for name, theirs in columns.items():
        if theirs not in has:
            raise DataError(
                f"data.source.columns.{name} names {theirs!r}, which {file} does not have: name one of {', '.join(has)}"
            )
    gone = {*columns, *columns.values()}
    taken = {name: name for name in has if name not in gone} | columns
    classes = _class_names(batch.schema)
    arrays = [_plain(batch[theirs], classes.get(theirs)) for theirs in taken.values()]
    return pa.RecordBatch.from_arrays(arrays, names=list(taken))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of numbered classes by column, from the metadata of Hugging Face's datasets."""
    kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = kept.get("info", {}).get("features", {}).items()
    return {name: kind["names"] for name, kind in features if isinstance(kind, dict) and kind.get("_type") == CLASSES}


def _plain(values: pa.Array, classes: list[str] | None) -> pa.Array:
    if classes and pa.types.is_integer(values.type):
        return pa.array(classes).take(pc.if_else(pc.less(values, 0), None, values))  # -1: of no class
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    return values


def content_of(batch: pa.RecordBatch, form: Form, file: str) -> pa.RecordBatch:
    """The columns that `form` reads. Raises DataError if a type can hold neither text nor turns."""
    known = [name for name in form.needs + form.optional if name in batch.schema.names]
    if "label" in known and batch["label"].type != pa.bool_():
        known.remove("label")  # a category, by which rows can be partitioned
    columns = []
    for name in known:
        kind = batch[name].type
        if not (pa.types.is_string(kind) or pa.types.is_null(kind) or _is_list(kind) or name == "label"):
            raise DataError(
                f"{file} has {kind} in its column {name}, which must hold text or turns: convert it, or name another "
                f"column in data.source.columns"
            )
        columns.append(batch[name].cast(pa.string()) if pa.types.is_null(kind) else batch[name])
    return pa.RecordBatch.from_arrays(columns, names=known)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_flat(content: pa.RecordBatch) -> bool:
    """Whether all columns are of text, or a boolean label."""
    return not any(_is_list(values.type) for values in content.columns)


def with_owner(batch: pa.RecordBatch, file: str) -> pa.RecordBatch:
    """The same columns with `client`, if there is one, as text. Raises DataError if its type has no text form."""
    if "client" not in batch.schema.names:
        return batch
    position, values = batch.schema.get_field_index("client"), batch["client"]
    try:
        return batch.set_column(position, "client", nan_is_null(values).cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{file} has {values.type} in its column client, which must hold text or numbers: convert it, or name "
            f"another column in data.source.columns"
        ) from None


def faults_of(batch: pa.RecordBatch, required: list[str]) -> Faults:
    """The rows that are not UTF-8, have no client in their column of clients, or are null in a required column."""
    faults: Faults = {}
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        faults = {row: BadRow("is not UTF-8") for row in range(len(batch)) if not _is_valid(batch, row)}
    if "client" in batch.schema.names:
        nameless = pc.fill_null(pc.equal(batch["client"], ""), True)
        faults = _where(nameless, BadRow("has a null or empty client")) | faults
    for name in required:
        if batch[name].null_count:
            faults = _where(batch[name].is_null(), BadRow(f"has a null {name}")) | faults
    return faults


def _is_valid(batch: pa.RecordBatch, row: int) -> bool:
    try:
        batch.take(pa.array([row])).validate(full=True)  # not a slice, which still holds the turns of all rows
    except pa.ArrowInvalid:
        return False
    return True


def _where(mask: pa.BooleanArray, fault: BadRow) -> Faults:
    return dict.fromkeys(np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist(), fault)


def without(batch: pa.RecordBatch, faults: Faults) -> pa.RecordBatch:
    """The rows that have no fault."""
    if not faults:
        return batch
    good = np.ones(len(batch), dtype=np.bool_)
    good[list(faults)] = False
    return batch.filter(pa.array(good))
