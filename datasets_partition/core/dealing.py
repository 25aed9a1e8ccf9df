"""What partitioners share: clients that have numbers for names, rows handed out in turn, and checks of a section."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.columns import Coded


def at_least(field: str, value: int, least: int) -> None:
    """Raises ValueError if the section's `field` is below `least`."""
    if value < least:
        raise ValueError(f"data.partition.{field} is {value}: ask for at least {least}")


def above_zero(field: str, value: float | tuple[float, ...]) -> None:
    """Raises ValueError if the section's `field` is not a finite number above 0, or several."""
    for number in value if isinstance(value, tuple) else (value,):
        if not 0 < number < float("inf"):
            raise ValueError(f"data.partition.{field} is {value}: give a number above 0")


def one_or_each(field: str, value: float | tuple[float, ...], each: int, what: str) -> None:
    """Raises ValueError if the section's `field` is several numbers, but not `each`, one for each `what`."""
    if isinstance(value, tuple) and len(value) != each:
        raise ValueError(
            f"data.partition.{field} has {len(value)} numbers for {each} {what}s: give one number, or one for each"
        )


def enough_rows(clients: int, rows: int) -> None:
    """Raises ValueError if there are more clients than rows."""
    if clients > rows:
        raise ValueError(
            f"data.partition.clients is {clients}, but there are only {rows} distinct rows: "
            f"ask for {rows} clients or fewer"
        )


def numbered(clients: int) -> pa.StringArray:
    """The clients' numbers as names, padded so that they sort."""
    numbers = pa.array(np.arange(clients)).cast(pa.string())
    return pc.utf8_lpad(numbers, len(str(clients - 1)), "0")


def joined(first: pa.StringArray, owners: NDArray[np.int64], then: pa.StringArray) -> pa.StringArray:
    """The names "first/then" of clients that are parts of others; just "first" where it is the only part.

    `owners` holds the number in `first` of each part. Raises ValueError if two parts would have one name.
    """
    parts = np.bincount(owners, minlength=len(first))
    whole = first.take(pa.array(owners))
    names = pc.if_else(pa.array(parts[owners] == 1), whole, pc.binary_join_element_wise(whole, then, "/"))
    counts = pc.value_counts(names)
    if len(counts) < len(names):
        twice = counts.field("values")[int(np.argmax(counts.field("counts").to_numpy()))].as_py()
        raise ValueError(
            f"data.partition would name two clients {twice!r}, one a part of a larger one: rename the key of either"
        )
    return names


def even(rows: int, parts: int) -> NDArray[np.int64]:
    """The sizes of `parts` parts of `rows` rows: the first ones have one more where it does not come out even."""
    size, rest = divmod(rows, parts)
    return size + (np.arange(parts) < rest)


def dealt(order: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The client of each row, if the first `counts[0]` rows of `order` are the first client's, and so on.

    Rows that are left over are nobody's.
    """
    clients = np.full(len(order), -1, np.int32)
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    clients[order[: len(owners)]] = owners
    return clients


def by_label(coded: Coded, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows label after label, at random within each; and how many rows each label has."""
    order = rng.permutation(len(coded.codes))
    small = coded.codes.astype(np.min_scalar_type(len(coded.values)))  # NumPy sorts 8 and 16 bits by radix
    order = order[np.argsort(small[order], kind="stable")]
    return order, np.bincount(coded.codes, minlength=len(coded.values))


def listed(clients: NDArray[np.int32], names: pa.StringArray) -> tuple[NDArray[np.int32], pa.StringArray]:
    """The same clients without those that have no row, numbered anew in the same order."""
    has_rows = np.bincount(clients[clients >= 0], minlength=len(names)) > 0
    if has_rows.all():
        return clients, names
    number = np.append(np.cumsum(has_rows, dtype=np.int32) - 1, np.int32(-1))  # the last is for nobody's
    return number[clients], names.filter(pa.array(has_rows))


def shared_out(rows: int, weights: NDArray[np.float64], offset: float = 0.5) -> NDArray[np.int64]:
    """How many of `rows` rows each weight gets: its share, to less than a row, with nothing left over.

    Rows lie `1 / rows` apart from `offset / rows` on, and whoever's stretch of the weights a row lies in gets it:
    a fixed `offset` rounds, a random one from [0, 1) gives each its share exactly on average.
    """
    edges = np.cumsum(weights)
    # An offset just below 1 may be rounded up to 1.
    edges = np.minimum(np.floor(edges / edges[-1] * rows + offset), rows).astype(np.int64)
    counts: NDArray[np.int64] = np.diff(edges, prepend=0)
    return counts
