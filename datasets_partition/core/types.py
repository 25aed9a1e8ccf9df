"""The central types: canonical tables, sources and their rows, partitioners and their assignments; checks and errors.

Every source returns a canonical table. It has one format; its content columns say which.

    prompt_completion      prompt, completion             strings; the prompt of plain text is empty
    messages               messages                       a list of turns, each with its role and content
    preference             prompt, chosen, rejected       strings, or lists of turns
    unpaired_preference    prompt, completion, label      strings, or lists of turns; true for a good completion
    prompt_only            prompt                         a string, or a list of turns

A table may also have `client`, a string, and any other column by which rows can be partitioned.

Turns of which some have more than role and content have two fields more: `learned`, false for an assistant's turn that
is context alone, and `more`, JSON text of the other keys that chat templates read (reasoning, tool calls, names). A row
of turns may have `template_options`, JSON text of what its chat template takes beside turns: `tools`, and what TRL
calls chat_template_kwargs. `turns.py` reads both.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

PROMPT_COMPLETION = "prompt_completion"
MESSAGES = "messages"
PREFERENCE = "preference"
UNPAIRED_PREFERENCE = "unpaired_preference"
PROMPT_ONLY = "prompt_only"

# A table's columns are compared with the formats in this order.
COLUMNS = {
    PREFERENCE: ("prompt", "chosen", "rejected"),
    MESSAGES: ("messages",),
    UNPAIRED_PREFERENCE: ("prompt", "completion", "label"),
    PROMPT_COMPLETION: ("prompt", "completion"),
    PROMPT_ONLY: ("prompt",),
}
IN_WORDS = {
    PROMPT_COMPLETION: "texts, prompts with completions",
    MESSAGES: "conversations",
    PREFERENCE: "preference pairs",
    UNPAIRED_PREFERENCE: "unpaired preferences",
    PROMPT_ONLY: "prompts alone",
}

OPTIONS = "template_options"
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
FULL_TURNS = pa.list_(pa.struct([*TURNS.value_type, ("learned", pa.bool_()), ("more", pa.string())]))
OnRows = Callable[[int], None]  # called now and then with the number of rows so far
TURN = {(field.name, field.type) for field in TURNS.value_type}
FULL_TURN = {(field.name, field.type) for field in FULL_TURNS.value_type}


class DataError(ValueError):
    """Says in one sentence what is wrong with rows, a source or a partition and what works instead."""

    exit_code = 2  # of the command, as for wrong usage


def format_of(table: pa.Table) -> str:
    """The format of a canonical table, a key of COLUMNS. Raises DataError if its columns make none."""
    names = set(table.column_names)
    if "label" in names and table.schema.field("label").type != pa.bool_():
        names.remove("label")  # a category, by which rows can be partitioned
    for name, columns in COLUMNS.items():
        if names.issuperset(columns):
            return name
    known = "; ".join(", ".join(columns) for columns in COLUMNS.values())
    raise DataError(f"the source gives the columns {', '.join(table.column_names)}, which make no format: give {known}")


def content_columns(table: pa.Table) -> tuple[str, ...]:
    """The columns that make up a row's content: two rows that agree on them are duplicates."""
    return COLUMNS[format_of(table)] + ((OPTIONS,) if OPTIONS in table.column_names else ())


class Rows(NamedTuple):
    """A source's rows in a canonical format (see the top of this file), and the number of rows left out, by reason."""

    table: pa.Table
    skipped: dict[str, int]


class Assignment(NamedTuple):
    """The client of each row, by number (-1: nobody's), and the clients' names by number.

    `category` is the label or topic that the partition used, if any: one string a row, for statistics. `order` ranks
    the rows where the partition orders a client's rows; otherwise they keep the source's order. `people` names the
    person whose rows each client has, where a person may have several clients: they are unseen together or not at all.
    """

    clients: NDArray[np.int32]
    names: pa.StringArray
    category: pa.Array | None = None
    order: NDArray[np.int64] | None = None
    people: pa.StringArray | None = None


def refuse_other_rows(given: object, source: object) -> None:
    """Raises DataError unless `given` is Rows whose content is canonical and without nulls."""
    named = f"the source {type(source).__name__}"
    if not isinstance(given, Rows) or not isinstance(given.table, pa.Table) or not isinstance(given.skipped, dict):
        raise DataError(f"{named} must give Rows of an Arrow table and a dict, not {type(given).__name__}")
    for name in content_columns(given.table):
        values, kind = given.table[name], given.table.schema.field(name).type
        parts = [values]
        is_turns = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
        if is_turns and (is_turns := TURN.issubset((field.name, field.type) for field in kind.value_type)):
            parts += [pc.struct_field(pc.list_flatten(values), part) for part, _ in TURN]
            if other := [field.name for field in kind.value_type if (field.name, field.type) not in FULL_TURN]:
                raise DataError(
                    f"{named} gives turns with the field {other[0]}, which nothing reads: put it into the field more, "
                    f"as JSON text of what chat templates read beside role and content"
                )
        if name == OPTIONS and pa.types.is_string(kind):
            continue
        if not (is_turns or pa.types.is_string(kind) or pa.types.is_large_string(kind) or name == "label"):
            raise DataError(f"{named} gives {kind} as its {name}, which must hold text or turns of role and content")
        if nulls := sum(part.null_count for part in parts):
            raise DataError(f"{named} gives {nulls} nulls in its {name}: leave such rows out and count them in skipped")


def refuse_misfit(given: object, rows: int, partitioner: object) -> None:
    """Raises DataError unless `given` is an Assignment of `rows` rows to clients with different names."""
    named = f"the partitioner {type(partitioner).__name__}"
    if not isinstance(given, Assignment) or not isinstance(given.names, pa.Array):
        raise DataError(f"{named} must give an Assignment whose names are an Arrow array, not {type(given).__name__}")
    clients = given.clients
    if not isinstance(clients, np.ndarray) or clients.shape != (rows,) or clients.dtype.kind not in "iu":
        raise DataError(f"{named} must give an array of one integer for each of the {rows} rows")
    if rows and not -1 <= clients.min() <= clients.max() < len(given.names):
        raise DataError(f"{named} names {len(given.names)} clients, but gives rows to others: -1 is nobody")
    if (clients < 0).all():
        raise DataError(f"{named} gives no row to anybody: change its keys")
    if len(pc.unique(given.names)) != len(given.names):
        raise DataError(f"{named} gives two clients the same name")
    for name, values in (("category", given.category), ("order", given.order)):
        if values is not None and len(values) != rows:
            raise DataError(f"{named} gives {len(values)} values of {name} for {rows} rows")
    if given.people is not None and len(given.people) != len(given.names):
        raise DataError(f"{named} names the people of {len(given.people)} clients, but has {len(given.names)} clients")


def ignore(rows: int) -> None:
    """An `OnRows` that does nothing."""


class Source(Protocol):
    """Where rows come from: a frozen dataclass, its fields the recipe section; ours also `load` with an `OnRows`."""

    def fingerprint(self) -> str:
        """A text that changes when the rows change although this section does not; it makes another store."""

    def load(self) -> Rows:
        """All rows, in a fixed order. Raises DataError for what a user can correct."""


class Partitioner(Protocol):
    """The rule that gives rows to clients: a frozen dataclass whose fields are its recipe section."""

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """The client of each row; the same on any machine. Raises DataError for what a user can correct."""
