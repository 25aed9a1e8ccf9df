"""From users' rows to one canonical table: from Arrow batches, or from Python objects as JSON gives them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

import pyarrow as pa

from datasets_partition.core.canonical import COLUMNS, TURNS, UNPAIRED_PREFERENCE, content_columns, format_of
from datasets_partition.core.columns import array_of, as_text, joined
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import OnRows, Rows, ignore
from datasets_partition.formats.arrow_columns import (
    Faults,
    content_of,
    faults_of,
    is_flat,
    renamed,
    with_owner,
    without,
)
from datasets_partition.formats.forms import BESIDE_TURNS, EXPECTED, NAMES, Content, Form, Row, form_of
from datasets_partition.formats.turns import BadRow, OnBadRow

# Rows converted at once: few enough for the 2 GiB of text in one Arrow array, many enough for Arrow to pay off.
ROWS_PER_BATCH = 16384

# Other columns of these names would make a table look like one of another format.
RESERVED = frozenset[str]().union(*COLUMNS.values()) - {"label"}


class Conversion:
    """Collects a source's rows, batch by batch; `rows` returns them as one table of one format, the first good row's.

    `columns` gives the file's name of a form's column, or of `client`: {"prompt": "question"}. Bad rows raise
    DataError, or are left out and counted by their reasons, as `on_bad_row` says.
    """

    def __init__(self, columns: dict[str, str], on_bad_row: OnBadRow, on_rows: OnRows = ignore) -> None:
        """Raises DataError where `columns` has another name, which no form would read."""
        if unknown := [name for name in columns if name not in NAMES]:
            raise DataError(
                f"data.source.columns has {', '.join(map(repr, unknown))}, which no form of rows reads: "
                f"on the left stands one of {', '.join(NAMES)}; data.partition names other columns as they are"
            )
        self.columns = columns
        self.on_bad_row = on_bad_row
        self.on_rows = on_rows
        self.skipped: Counter[str] = Counter()
        self.first: tuple[str, bool, bool] | None = None  # its format, whether it holds turns, whether it has a client
        self.tables: list[pa.Table] = []
        self.kept = 0

    def add_batch(
        self, batch: pa.RecordBatch, file: str, numbers: Sequence[int], unit: str, known: Faults | None = None
    ) -> None:
        """Converts Arrow columns of `file`; errors name a row by its number in units of `unit`, such as "line".

        `known` are rows that the source knows to be bad. Raises DataError if the columns fit no format.
        """
        has = ", ".join(batch.schema.names) or "(none)"
        batch = with_owner(renamed(batch, self.columns, file), file)
        form = self._form(batch.schema.names)
        if form is None:
            raise DataError(
                f"{file} has the columns {has}, which fit no format: name yours in data.source.columns so that they "
                f"make {EXPECTED}"
            )
        content = content_of(batch, form, file)
        owned = "client" in batch.schema.names
        if form.flat and is_flat(content):
            required = [name for name in content.schema.names if name in (*form.needs, "label")]
            faults = faults_of(batch, required) | (known or {})
            good = without(content, faults)
            table = pa.table(form.flat({name: good[name] for name in good.schema.names}))
            if table.num_rows and (fault := self._other(format_of(table), False, owned)):
                faults = dict.fromkeys(range(len(batch)), fault) | faults
                table = table.slice(0, 0)
        else:
            faults = faults_of(batch, ["label"] if "label" in content.schema.names else []) | (known or {})
            table = self._row_by_row(content, form, owned, faults)
        for position, fault in sorted(faults.items()):
            self._refuse(f"{file} {unit} {numbers[position]}", fault)
        others = without(batch, faults)
        names = _others(batch.schema.names, form, content.schema.names)
        self._keep(table, pa.table({name: others[name] for name in names}))

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
                except BadRow as bad:
                    self._refuse(where, bad)
                else:
                    contents.append(content)
                    others.append(other)
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

    def _form(self, names: list[str]) -> Form | None:
        return form_of(frozenset(names), frozenset(self.columns))

    def _row_by_row(self, content: pa.RecordBatch, form: Form, owned: bool, faults: Faults) -> pa.Table:
        """The content of the rows without faults; a fault that this finds is added to `faults`."""
        good = [position for position in range(len(content)) if position not in faults]
        contents = []
        for position, row in zip(good, without(content, faults).to_pylist(), strict=True):
            try:
                contents.append(self._content(row, form, owned))
            except BadRow as bad:
                faults[position] = bad
        return _table(contents)

    def _split(self, row: Row) -> tuple[Row, Row]:
        """A row's content, and its other columns."""
        original = row
        if self.columns:
            if missing := [theirs for theirs in self.columns.values() if theirs not in row]:
                raise BadRow(f"has no column {missing[0]!r}, which data.source.columns names", _has(original))
            mapped = {*self.columns, *self.columns.values()}
            row = {name: value for name, value in row.items() if name not in mapped}
            row |= {name: original[theirs] for name, theirs in self.columns.items()}
        form = self._form(list(row))
        if form is None:
            raise BadRow("fits no format", f"{_has(original)}; it needs {EXPECTED}")
        if "client" in row:
            row["client"] = _client(row["client"])
        content = self._content(row, form, "client" in row)
        return content, {name: row[name] for name in _others(list(row), form, list(content))}

    def _content(self, row: Row, form: Form, owned: bool) -> Row:
        content: Content = form.row(row)
        nested = any(isinstance(value, list) for value in content.values.values())
        if fault := self._other(content.format, nested, owned):
            raise fault
        return content.values

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
        table = pa.table(
            dict(zip(content.column_names, content.columns, strict=True))
            | {name: others[name] for name in others.column_names}
        )
        # Beside a prompt and a completion a boolean label would mean an unpaired preference.
        if "label" in others.column_names and format_of(table) == UNPAIRED_PREFERENCE:
            position = table.column_names.index("label")
            table = table.set_column(position, "label", table["label"].cast(pa.string()))
        self.tables.append(table)
        self.kept += table.num_rows
        self.on_rows(self.kept)


def _others(names: list[str], form: Form, content: list[str]) -> list[str]:
    """The columns that are no part of a row's content and do not look like one."""
    taken = RESERVED | {*form.needs, *form.optional} - {*BESIDE_TURNS}
    if "label" not in content:
        taken -= {"label"}  # a category
    return [name for name in names if name not in taken]


def _table(contents: list[Row]) -> pa.Table:
    """Contents of one format as columns."""
    first = contents[0] if contents else {}
    types = {str: pa.string(), list: TURNS, bool: pa.bool_()}
    return pa.table({name: pa.array([row[name] for row in contents], types[type(first[name])]) for name in first})


def _client(value: object) -> str:
    if value in (None, "") or value != value:  # NaN
        raise BadRow("has a null or empty client")
    if isinstance(value, list | dict):
        raise BadRow("has a client that is neither text nor a number", json.dumps(value))
    return str(as_text(value))


def _has(row: Row) -> str:
    kinds = (f"{name} ({'null' if value is None else type(value).__name__})" for name, value in row.items())
    return f"its columns are {', '.join(kinds) or 'none'}"
