"""From users' rows to one canonical table: from Arrow batches, or from Python objects as JSON gives them."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.core.columns import array_of, as_text, is_list, joined, nan_is_null
from datasets_partition.core.types import (
    COLUMNS,
    FULL_TURNS,
    OPTIONS,
    TURNS,
    DataError,
    OnRows,
    Rows,
    content_columns,
    format_of,
    ignore,
)
from datasets_partition.formats.forms import BESIDE_TURNS, NAMES, Form, OnBadRow, form_of
from datasets_partition.formats.rows import BadRow, Row, kind_of
from datasets_partition.formats.turns import opened, without_nulls

# Rows converted at once: few enough for the 2 GiB of text in one Arrow array, many enough for Arrow to pay off.
ROWS_PER_BATCH = 16384
Faults = dict[int, BadRow]  # by the row's position in its batch
EXPECTED = (
    "text; messages; prompt and completion; prompt, chosen and rejected; "
    "instruction and output; conversations; or prompt alone"
)
# Other columns of these names would make a table look like one of another format.
RESERVED = frozenset[str]().union(*COLUMNS.values()) - {"label"} | {OPTIONS}


class Conversion:
    """Collects a source's rows, batch by batch; `rows` returns them as one table of one format, the first good row's.

    `columns` maps a form's columns, or `client`, to the file's: {"prompt": "question"}. `on_bad_row` says whether a bad
    row raises DataError, or is left out and counted by its reason. Keys of turns, and columns beside them, that are
    in `leave_out` are not read.
    """

    def __init__(
        self, columns: dict[str, str], on_bad_row: OnBadRow, on_rows: OnRows = ignore, leave_out: tuple[str, ...] = ()
    ) -> None:
        """Raises DataError where `columns` has another name, which no form would read."""
        if unknown := [name for name in columns if name not in NAMES]:
            raise DataError(
                f"data.source.columns has {', '.join(map(repr, unknown))}, which no form of rows reads: "
                f"on the left stands one of {', '.join(NAMES)}; data.partition names other columns as they are"
            )
        self.columns = columns
        self.on_bad_row = on_bad_row
        self.on_rows = on_rows
        self.leave_out = leave_out
        self.skipped: Counter[str] = Counter()
        self.first: tuple[str, bool, bool] | None = None  # its format, whether it holds turns, whether it has a client
        self.tables: list[pa.Table] = []

    def add_batch(
        self, batch: pa.RecordBatch, file: str, numbers: Sequence[int], unit: str, known: Faults | None = None
    ) -> None:
        """Converts Arrow columns of `file`; errors name a row by its number in units of `unit`, such as "line".

        `known` are rows that the source knows to be bad. Raises DataError if the columns fit no format.
        """
        has = ", ".join(batch.schema.names) or "(none)"
        batch = _with_owner(_renamed(batch, self.columns, file), file)
        form = form_of(frozenset(batch.schema.names) - {*self.leave_out}, frozenset(self.columns))
        if form is None:
            raise DataError(
                f"{file} has the columns {has}, which fit no format: name yours in data.source.columns so that they "
                f"make {EXPECTED}"
            )
        if unread := self._unread(form):
            raise DataError(f"{unread}: {file} has the columns {has}")
        content = self._content_of(batch, form, file)
        owned = "client" in batch.schema.names
        flat = form.flat if self._is_flat(content, form) else None
        required = {*form.needs, "label"} if flat else {"label"}
        faults = _faults_of(batch, [name for name in content.schema.names if name in required]) | (known or {})
        if flat:
            good = _without(content, faults)
            table = pa.table(flat({name: good[name] for name in good.schema.names}))
            if table.num_rows and (fault := self._other(format_of(table), False, owned)):
                faults = dict.fromkeys(range(len(batch)), fault) | faults
                table = table.slice(0, 0)
        else:
            table = self._row_by_row(content, form, owned, faults)
        for position, fault in sorted(faults.items()):
            self._refuse(f"{file} {unit} {numbers[position]}", fault)
        others = _without(batch, faults)
        names = self._others(batch.schema.names, form, content.schema.names)
        self._keep(table, pa.table({kept: others[name] for name, kept in names.items()}))

    def add_batches(self, batches: Iterable[pa.RecordBatch], file: str) -> None:
        """Converts all of a file's batches, whose rows are numbered from 1."""
        first = 1
        for batch in batches:
            self.add_batch(batch, file, range(first, first + len(batch)), "row")
            first += len(batch)

    def add_objects(self, rows: Iterable[tuple[str, Row | BadRow]]) -> None:
        """Converts Python objects, and bad rows in their places, each with the name of the row."""
        rows = iter(rows)
        while some := list(islice(rows, ROWS_PER_BATCH)):
            contents: list[Row] = []
            others: list[Row] = []
            for where, row in some:
                try:
                    if isinstance(row, BadRow):
                        raise row
                    content, other = self._split(row)
                    contents.append(content)
                    others.append(other)
                except BadRow as bad:
                    self._refuse(where, bad)
            names = sorted(set[str]().union(*others))
            columns = {name: array_of([row.get(name) for row in others]) for name in names}
            self._keep(_table(contents), pa.table(columns))

    def rows(self, location: str) -> Rows:
        """All rows: client if any, content, other columns by name. Raises DataError if there are none."""
        if not self.tables:
            reasons = "; ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
            skipped = f" that can be used ({reasons})" if reasons else ""
            raise DataError(f"{location} has no rows{skipped}: give data.source something that has")
        table = joined(self.tables)
        first = [name for name in ("client", *content_columns(table)) if name in table.column_names]
        return Rows(table.select([*first, *sorted(set(table.column_names) - set(first))]), dict(self.skipped))

    def _refuse(self, where: str, bad: BadRow) -> None:
        """Counts the bad row at `where`, its file and number, or raises DataError for it."""
        if self.on_bad_row == "error":
            detail = f" ({bad.detail})" if bad.detail else ""
            raise DataError(
                f'{where} {bad.reason}{detail}: correct it, or leave such rows out with data.source.on_bad_row = "skip"'
            )
        self.skipped[bad.reason] += 1

    def _row_by_row(self, content: pa.RecordBatch, form: Form, owned: bool, faults: Faults) -> pa.Table:
        """The content of the rows without faults; a fault that this finds is added to `faults`."""
        good = [position for position in range(len(content)) if position not in faults]
        contents = []
        for position, row in zip(good, _listed(content, faults), strict=True):
            try:
                contents.append(self._content(row, form, owned))
            except BadRow as bad:
                faults[position] = bad
        return _table(contents)

    def _split(self, row: Row) -> tuple[Row, Row]:
        """A row's content, and its other columns."""
        original = row
        if missing := [theirs for theirs in self.columns.values() if theirs not in row]:
            raise BadRow(f"has no column {missing[0]!r}, which data.source.columns names", _has(row))
        row = {_kept(name, self.columns): value for name, value in row.items() if name not in self.columns.values()}
        row |= {name: original[theirs] for name, theirs in self.columns.items()}
        form = form_of(frozenset(row) - {*self.leave_out}, frozenset(self.columns))
        if form is None:
            raise BadRow("fits no format", f"{_has(original)}; it needs {EXPECTED}")
        if "client" in row:
            row["client"] = _client(row["client"])
        if unread := self._unread(form):
            raise DataError(f"{unread}: {_has(original)}")
        content = self._content(row, form, "client" in row)
        return content, {kept: row[name] for name, kept in self._others(list(row), form, list(content)).items()}

    def _unread(self, form: Form) -> str | None:
        """The complaint about a column that the user names and that rows of this form do not read."""
        reads = form.reads(self.columns)
        for name in self.columns:
            if name not in (*reads, "client", "label"):
                return (
                    f"data.source.columns.{name} is not read beside {' and '.join(form.needs)}, only "
                    f"{', '.join(each for each in reads if each != OPTIONS)}: leave it out, as data.partition names "
                    f"other columns as they are"
                )
        return None

    def _reads(self, form: Form) -> list[str]:
        return [name for name in form.reads(self.columns) if name not in self.leave_out]

    def _content_of(self, batch: pa.RecordBatch, form: Form, file: str) -> pa.RecordBatch:
        """The columns that `form` reads. Raises DataError if a type can hold neither text nor turns."""
        known = [name for name in self._reads(form) if name in batch.schema.names]
        if "label" in known and batch["label"].type != pa.bool_():
            known.remove("label")  # a category, by which rows can be partitioned
        columns = []
        for name in known:
            kind = batch[name].type
            if name in form.needs and not (
                pa.types.is_string(kind) or pa.types.is_null(kind) or is_list(kind) or pa.types.is_struct(kind)
            ):
                raise DataError(
                    f"{file} has {kind} in its column {name}, which must hold text or turns: convert it, or name "
                    f"another column in data.source.columns"
                )
            columns.append(batch[name].cast(pa.string()) if pa.types.is_null(kind) else batch[name])
        return pa.RecordBatch.from_arrays(columns, names=known)

    def _is_flat(self, content: pa.RecordBatch, form: Form) -> bool:
        """Whether the content is text that its form converts as columns."""
        is_text = all(pa.types.is_string(content[name].type) for name in form.needs)
        return is_text and not {"system", "history"} & {*content.schema.names}

    def _others(self, names: list[str], form: Form, content: list[str]) -> dict[str, str]:
        """The columns that rows are not made of, and under which names they are kept, for the partition."""
        taken = {*form.needs, *form.optional} - {*BESIDE_TURNS, *self.leave_out}
        if "label" not in content:
            taken -= {"label"}  # a category
        return {name: _kept(name, RESERVED) for name in names if name not in taken}

    def _content(self, row: Row, form: Form, owned: bool) -> Row:
        reads = {name: opened(name, row[name], self.leave_out) for name in self._reads(form) if name in row}
        format, content = form.row(reads)
        nested = any(isinstance(value, list) for value in content.values())
        if fault := self._other(format, nested, owned):
            raise fault
        return content

    def _other(self, format: str, nested: bool, owned: bool) -> BadRow | None:
        """The reason why a row of this kind does not fit the rows before it; None if it does."""
        self.first = self.first or (format, nested, owned)
        if owned != self.first[2]:
            return BadRow(f"has {'a' if owned else 'no'} client, unlike the rows before it")
        if (format, nested) != self.first[:2]:
            kinds = ((format, nested), self.first[:2])
            now, then = (f"{name} of {'turns' if is_nested else 'text'}" for name, is_nested in kinds)
            return BadRow("is of another format than the rows before it", f"{now}, not {then}")
        return None

    def _keep(self, content: pa.Table, others: pa.Table) -> None:
        if not content.num_rows:
            return
        table = pa.table({name: part[name] for part in (content, others) for name in part.column_names})
        # Beside a prompt and a completion a boolean label would mean an unpaired preference.
        if "label" in others.column_names and "label" in content_columns(table):
            table = table.set_column(table.column_names.index("label"), "label", table["label"].cast(pa.string()))
        self.tables.append(table)
        self.on_rows(sum(table.num_rows for table in self.tables))


def _table(contents: list[Row]) -> pa.Table:
    """Contents of one format as columns."""
    names = [*dict.fromkeys(name for row in contents for name in row)]
    columns = {name: [row.get(name) for row in contents] for name in names}
    return pa.table({name: pa.array(values, _type(values)) for name, values in columns.items()})


def _type(values: list[Any]) -> pa.DataType:
    kind = next(type(value) for value in values if value is not None)
    if kind is not list:
        return {str: pa.string(), bool: pa.bool_()}[kind]
    return TURNS if all(len(turn) == 2 for conversation in values for turn in conversation) else FULL_TURNS


def _listed(batch: pa.RecordBatch, faults: Faults) -> list[Row]:
    """The rows that have no fault, as Python objects."""
    rows: list[Row] = _without(batch, faults).to_pylist(maps_as_pydicts="strict")
    return [{name: without_nulls(value) for name, value in row.items()} for row in rows]


def _kept(name: str, taken: Collection[str]) -> str:
    """The name under which a column is kept for the partition, where names that are taken mean something else."""
    return f"source_{name}" if name in taken else name


def _client(value: object) -> str:
    if value in (None, "") or value != value:  # NaN
        raise BadRow("has a null or empty client")
    if isinstance(value, list | dict):
        raise BadRow("has a client that is neither text nor a number", json.dumps(value))
    return str(as_text(value))


def _has(row: Row) -> str:
    kinds = (f"{name} ({kind_of(value)})" for name, value in row.items())
    return f"its columns are {', '.join(kinds) or 'none'}"


def _renamed(batch: pa.RecordBatch, columns: dict[str, str], file: str) -> pa.RecordBatch:
    """The columns with their canonical names, in plain types. Raises DataError where `columns` names a missing one."""
    has = batch.schema.names
    if twice := sorted({name for name in has if has.count(name) > 1}):
        raise DataError(f"{file} has more than one column {', '.join(twice)}: rename all but one of them")
    for name, theirs in columns.items():
        if theirs not in has:
            raise DataError(
                f"data.source.columns.{name} names {theirs!r}, which {file} does not have: name one of {', '.join(has)}"
            )
    taken = {_kept(name, columns): name for name in has if name not in columns.values()} | columns
    classes = _class_names(batch.schema)
    arrays = [_plain(batch[theirs], classes.get(theirs)) for theirs in taken.values()]
    return pa.RecordBatch.from_arrays(arrays, names=list(taken))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of numbered classes by column, from the metadata of Hugging Face's datasets."""
    kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = kept.get("info", {}).get("features", {}).items()
    return {
        name: kind["names"] for name, kind in features if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
    }


def _plain(values: pa.Array, classes: list[str] | None) -> pa.Array:
    if classes and pa.types.is_integer(values.type):
        return pa.array(classes).take(pc.if_else(pc.less(values, 0), None, values))  # -1: of no class
    if isinstance(values.type, pa.BaseExtensionType):  # such as datasets' Json
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    return values


def _with_owner(batch: pa.RecordBatch, file: str) -> pa.RecordBatch:
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


def _faults_of(batch: pa.RecordBatch, required: list[str]) -> Faults:
    """The rows that are not UTF-8, have no client in their column of clients, or are null in a required column."""
    faults: Faults = {}
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for row in range(len(batch)):
            try:
                batch.take(pa.array([row])).validate(full=True)  # not a slice, which still holds the turns of all rows
            except pa.ArrowInvalid:
                faults[row] = BadRow("is not UTF-8")
    if "client" in batch.schema.names:
        nameless = pc.fill_null(pc.equal(batch["client"], ""), True)
        faults = _where(nameless, BadRow("has a null or empty client")) | faults
    for name in required:
        faults = _where(batch[name].is_null(), BadRow(f"has a null {name}")) | faults
    return faults


def _where(mask: pa.BooleanArray, fault: BadRow) -> Faults:
    return dict.fromkeys(np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist(), fault)


def _without(batch: pa.RecordBatch, faults: Faults) -> pa.RecordBatch:
    """The rows that have no fault."""
    return batch.filter(pa.array(~np.isin(np.arange(len(batch)), list(faults)))) if faults else batch
