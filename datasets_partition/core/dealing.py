"""What partitioners share: checks of a section, clients named by numbers, and rows handed out in turn."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.columns import Coded
from datasets_partition.core.types import DataError


def at_least(least: int, **fields: int | None) -> None:
    """Raises DataError if a field of the section is below `least`; None is a field that is not given."""
    for field, value in fields.items():
        if value is not None and value < least:
            raise DataError(f"data.partition.{field} is {value}: ask for at least {least}")


def above_zero(**fields: float | tuple[float, ...]) -> None:
    """Raises DataError if a field of the section is not a finite number above 0, or several of them."""
    for field, value in fields.items():
        if not all(0 < number < float("inf") for number in (value if isinstance(value, tuple) else (value,))):
            raise DataError(f"data.partition.{field} is {value}: give a number above 0")


def single_or_each(field: str, value: float | tuple[float, ...], each: int, what: str) -> None:
    """Raises DataError if the section's `field` holds several numbers, but not `each`, one for each `what`."""
    if isinstance(value, tuple) and len(value) != each:
        raise DataError(
            f"data.partition.{field} has {len(value)} numbers for {each} {what}s: give one number, or one for each"
        )


def text_columns(columns: tuple[str, ...] | None, purpose: str) -> None:
    """Raises DataError if the section's `columns` are given, and are none."""
    if columns == ():
        raise DataError(f"data.partition.columns is empty: name the columns whose text {purpose}")


def enough_rows(clients: int, rows: int, min_rows: int = 1) -> None:
    """Raises DataError if there are more clients than rows, or than can have `min_rows` each."""
    if clients > rows:
        raise DataError(
            f"data.partition.clients is {clients}, but there are only {rows} distinct rows: "
            f"ask for {rows} clients or fewer"
        )
    if clients * min_rows > rows:
        raise DataError(
            f"data.partition.min_rows is {min_rows} for {clients} clients, but there are only {rows} distinct rows: "
            f"lower it to {rows // clients}, or ask for fewer clients"
        )


def given_sizes(sizes: tuple[int, ...], rows: int) -> NDArray[np.int64]:
    """The section's `sizes` as an array. Raises DataError if they add up to more than the rows."""
    if sum(sizes) > rows:
        raise DataError(
            f"data.partition.sizes adds up to {sum(sizes)}, but there are only {rows} distinct rows: lower the sizes"
        )
    return np.array(sizes, dtype=np.int64)


def numbered(clients: int) -> pa.StringArray:
    """The clients' numbers as names, padded so that they sort."""
    return pc.utf8_lpad(pa.array(np.arange(clients)).cast(pa.string()), len(str(clients - 1)), "0")


def joined(first: pa.StringArray, owners: NDArray[np.int64], then: pa.StringArray) -> pa.StringArray:
    """The names "first/then" of parts of `owners`; just "first" of a single part. DataError for twins."""
    parts = np.bincount(owners, minlength=len(first))
    whole = first.take(pa.array(owners))
    names = pc.if_else(pa.array(parts[owners] == 1), whole, pc.binary_join_element_wise(whole, then, "/"))
    counts = pc.value_counts(names)
    if len(counts) < len(names):
        twice = counts.field("values")[int(np.argmax(counts.field("counts").to_numpy()))].as_py()
        raise DataError(
            f"data.partition would name two clients {twice!r}, one a part of a larger one: rename the key of either"
        )
    return names


def even(rows: int, parts: int) -> NDArray[np.int64]:
    """The sizes of `parts` parts of `rows` rows; the first parts have one row more where it does not divide."""
    size, rest = divmod(rows, parts)
    return size + (np.arange(parts) < rest)


def dealt(order: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The client of each row if the first `counts[0]` rows of `order` are the first client's, and so on; others: -1."""
    return placed(order, np.repeat(np.arange(len(counts), dtype=np.int32), counts))


def placed(order: NDArray[np.int64], owners: NDArray[np.int32]) -> NDArray[np.int32]:
    """The client of each row, if the row `order[i]` belongs to `owners[i]`; rows after the last owner are nobody's."""
    clients = np.full(len(order), -1, np.int32)
    clients[order[: len(owners)]] = owners
    return clients


def together(clients: NDArray[np.int32], groups: NDArray[np.int64], strata: NDArray[np.int64]) -> NDArray[np.int32]:
    """The client of each row after all rows of a group have gone to one client; nobody's rows stay nobody's (-1).

    The groups of a stratum, which is that of their first rows, line up by the clients of their first rows; the clients
    line up with the rows that they had, and each group goes to the client at its middle row. So within a stratum a
    client's number of rows changes by at most the rows of its largest group, and not at all if groups are single rows.
    """
    dealt = np.flatnonzero(clients >= 0)
    before = clients[dealt]
    _, first, group, sizes = np.unique(groups[dealt], return_index=True, return_inverse=True, return_counts=True)
    stratum = strata[dealt[first]]
    order = np.lexsort((before[first], stratum))
    line = before[np.lexsort((before, stratum[group]))]
    after = np.empty(len(first), np.int32)
    after[order] = line[middles(sizes[order])]
    moved = np.full(len(clients), -1, np.int32)
    moved[dealt] = after[group]
    return moved


def middles(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of the middle row, the former of two, of each of several groups that stand in a line."""
    places: NDArray[np.int64] = np.cumsum(sizes) - sizes + (sizes - 1) // 2
    return places


def positions(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers from 0 up to each count, one count after the other: [2, 3] gives [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def by_label(coded: Coded, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows label after label, at random within each; and the number of rows of each label."""
    order = rng.permutation(len(coded.codes))
    small = coded.codes.astype(np.min_scalar_type(len(coded.values)))  # NumPy sorts 8 and 16 bits by radix
    order = order[np.argsort(small[order], kind="stable")]
    return order, np.bincount(coded.codes, minlength=len(coded.values))


def listed(clients: NDArray[np.int32], names: pa.StringArray) -> tuple[NDArray[np.int32], pa.StringArray]:
    """The same clients without those that have no row, numbered again in the same order."""
    has_rows = np.bincount(clients[clients >= 0], minlength=len(names)) > 0
    if has_rows.all():
        return clients, names
    number = np.append(np.cumsum(has_rows, dtype=np.int32) - 1, np.int32(-1))  # the last is for nobody's
    return number[clients], names.filter(pa.array(has_rows))


def shared_out(rows: int, weights: NDArray[np.float64], offset: float = 0.5) -> NDArray[np.int64]:
    """How many of `rows` rows each weight gets: its share, to less than a row, with nothing left over.

    Rows lie `1 / rows` apart from `offset / rows` on, and a row goes to the weight in whose stretch it lies: a fixed
    `offset` rounds, a random one from [0, 1) gives each weight its share exactly on average.
    """
    edges = np.cumsum(weights)
    # An offset just below 1 may be rounded up to 1.
    edges = np.minimum(np.floor(edges / edges[-1] * rows + offset), rows).astype(np.int64)
    counts: NDArray[np.int64] = np.diff(edges, prepend=0)
    return counts
