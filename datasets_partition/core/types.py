"""The central types: what a source gives, what a partitioner decides, and what each of them is."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.canonical import TURNS, content_columns

OnRows = Callable[[int], None]  # told now and then how many rows are done
TURN = {(field.name, field.type) for field in TURNS.value_type}


class Rows(NamedTuple):
    """A source's rows in a canonical format (see canonical.py), and how many it had to leave out, by reason."""

    table: pa.Table
    skipped: dict[str, int]


class Assignment(NamedTuple):
    """Whose each row is: the client's number (-1: nobody's), and the clients' names by number.

    `category` is what the partition went by, if it went by a label or a topic: one string a row, for statistics.
    `order` ranks the rows where they have an order to be kept within a client; otherwise the source's order is.
    """

    clients: NDArray[np.int32]
    names: pa.StringArray
    category: pa.Array | None = None
    order: NDArray[np.int64] | None = None


def refuse_other_rows(given: object, source: object) -> None:
    """Raises ValueError unless `given` is Rows whose content is canonical, with nothing null in it."""
    said = f"the source {type(source).__name__}"
    if not isinstance(given, Rows) or not isinstance(given.table, pa.Table) or not isinstance(given.skipped, dict):
        raise ValueError(f"{said} must give Rows of an Arrow table and a dict, not {type(given).__name__}")
    for name in content_columns(given.table):
        values, kind = given.table[name], given.table.schema.field(name).type
        parts = [values]
        is_turns = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
        if is_turns and (is_turns := TURN.issubset((field.name, field.type) for field in kind.value_type)):
            parts += [pc.struct_field(pc.list_flatten(values), part) for part, _ in TURN]
        if not (is_turns or pa.types.is_string(kind) or pa.types.is_large_string(kind) or name == "label"):
            raise ValueError(f"{said} gives {kind} as its {name}, which must hold text or turns of role and content")
        if nulls := sum(part.null_count for part in parts):
            raise ValueError(
                f"{said} gives {nulls} nulls in its {name}: leave such rows out, and count them in skipped"
            )


def refuse_misfit(given: object, rows: int, partitioner: object) -> None:
    """Raises ValueError unless `given` is an Assignment of so many rows to clients, each with a name of its own."""
    said = f"the partitioner {type(partitioner).__name__}"
    if not isinstance(given, Assignment) or not isinstance(given.names, pa.Array):
        raise ValueError(f"{said} must give an Assignment whose names are an Arrow array, not {type(given).__name__}")
    clients = given.clients
    if not isinstance(clients, np.ndarray) or clients.shape != (rows,) or clients.dtype.kind not in "iu":
        raise ValueError(f"{said} must give an array of one integer for each of the {rows} rows")
    if rows and not -1 <= clients.min() <= clients.max() < len(given.names):
        raise ValueError(f"{said} names {len(given.names)} clients, but gives rows to others: -1 is nobody")
    if (clients < 0).all():
        raise ValueError(f"{said} gives no row to anybody: change its keys")
    if len(pc.unique(given.names)) != len(given.names):
        raise ValueError(f"{said} gives two clients the same name")
    for name, values in (("category", given.category), ("order", given.order)):
        if values is not None and len(values) != rows:
            raise ValueError(f"{said} gives {len(values)} values of {name} for {rows} rows")


def ignore(rows: int) -> None:
    """The listener where nobody asks how far it is."""


class Source(Protocol):
    """Where rows come from: a frozen dataclass whose fields are its recipe section.

    Those that come with this folder also take an `OnRows`, for the rows that they have read so far.
    """

    def fingerprint(self) -> str:
        """What the rows depend on beside this section; another fingerprint means another store."""
        ...

    def load(self) -> Rows:
        """All rows, in a fixed order. Raises ValueError for what a person can mend."""
        ...


class Partitioner(Protocol):
    """Who owns which row: a frozen dataclass whose fields are its recipe section."""

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """The client of each row of `table`; the same table and `rng` give the same assignment on any machine.

        Raises ValueError for what a person can mend.
        """
        ...
