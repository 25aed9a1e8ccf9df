"""The natural partitions: the author of a row owns it. Clients may be coarser, finer, or ordered in time."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.columns import column, keys
from datasets_partition.core.dealing import at_least, even, joined, numbered, positions
from datasets_partition.core.types import Assignment, DataError

# What a column of text may hold, tried in this order: numbers, or ISO dates and times, without or with a time zone.
FORMS = (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


@dataclass(frozen=True, kw_only=True)
class Natural:
    """A client for each value of `key`, in order of their texts (flwr-datasets' NaturalIdPartitioner sorts numbers)."""

    kind: Literal["natural"] = "natural"
    key: str = "client"

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Uses no randomness. Raises DataError if the column is missing, or a value of it is null or empty."""
        return Assignment(*keys(table, "data.partition.key", self.key))


@dataclass(frozen=True, kw_only=True)
class GroupedNatural:
    """`keys` values of the column `key` are one client, or values with more than `max_rows` rows are several.

    Values are grouped in sorted order. Where `keys` does not divide their number, `rest` makes of the last a `smaller`
    client, members of `bigger` groups, nobody's (`drop`), or an error (`refuse`): flwr-datasets'
    GroupedNaturalIdPartitioner with `sort_unique_ids`. With `max_rows`, the rows of a value are cut into as few parts
    as can be, in the source's order and as even as can be, named "value/0", "value/1", ...
    """

    kind: Literal["grouped_natural"] = "grouped_natural"
    key: str = "client"
    keys: int | None = None
    rest: Literal["smaller", "bigger", "drop", "refuse"] = "smaller"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if (self.keys is None) == (self.max_rows is None):
            raise DataError("data.partition needs either keys (for each client) or max_rows: give one of them")
        at_least(1, keys=self.keys, max_rows=self.max_rows)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Uses no randomness. Raises DataError for rows without a key, too few keys, or parts of the same name."""
        coded = keys(table, "data.partition.key", self.key)
        if self.max_rows is None:
            group = self._groups(len(coded.values))
            return Assignment(group[coded.codes], numbered(int(group.max()) + 1))
        rows = np.bincount(coded.codes, minlength=len(coded.values))
        parts = -(-rows // self.max_rows)
        # Row i of n in m parts goes to the part floor(i m / n), which makes the parts even.
        part = positions(rows) * np.repeat(parts, rows) // np.repeat(rows, rows)
        clients = np.empty(table.num_rows, np.int32)
        clients[np.argsort(coded.codes, kind="stable")] = np.repeat(np.cumsum(parts) - parts, rows) + part
        owners = np.repeat(np.arange(len(parts)), parts)
        names = joined(coded.values, owners, pa.array(positions(parts)).cast(pa.string()))
        return Assignment(clients, names, people=coded.values.take(pa.array(owners)))

    def _groups(self, values: int) -> NDArray[np.int32]:
        """The group of each key, -1 for those that are dropped."""
        assert self.keys is not None
        whole, rest = divmod(values, self.keys)
        if (not whole and self.rest != "smaller") or (rest and self.rest == "refuse"):
            raise DataError(
                f"data.partition.keys is {self.keys}, but {self.key!r} has {values} values, which make {whole} whole "
                f'groups and leave {rest}: choose another number, or rest = "smaller"'
            )
        if self.rest == "bigger":
            return np.repeat(np.arange(whole, dtype=np.int32), even(values, whole))
        groups = np.arange(values, dtype=np.int32) // np.int32(self.keys)
        if self.rest == "drop":
            groups[groups == whole] = -1
        return groups


@dataclass(frozen=True, kw_only=True)
class ByTime:
    """A client for each value of `key`, as in `Natural`, whose rows are in the order of the column `time`.

    `time` holds numbers, dates or times, or text that is all numbers or all ISO 8601; ties stay in the source's order.
    """

    kind: Literal["time"] = "time"
    key: str = "client"
    time: str

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Uses no randomness. Raises DataError if a column is missing, or does not hold what it should in each row."""
        clients, names = keys(table, "data.partition.key", self.key)
        times = column(table, "data.partition.time", self.time)
        kind = times.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            times = _parsed(times, self.time)
        elif not (pa.types.is_temporal(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(f"data.partition.time names {self.time!r}, which holds {kind}: name a column of times")
        if timeless := pc.sum(pc.is_null(times, nan_is_null=True)).as_py():
            raise DataError(
                f"data.partition.time names {self.time!r}, which is null in {timeless} of {table.num_rows} rows: "
                "fill it in, or leave those rows out of the source"
            )
        ranks = np.empty(len(times), np.int64)
        ranks[np.argsort(times.to_numpy(), kind="stable")] = np.arange(len(times))
        return Assignment(clients, names, order=ranks)


def _parsed(times: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    reasons = []
    for form in FORMS:
        try:
            return times.cast(form)
        except pa.ArrowInvalid as error:
            reasons.append(str(error))
    raise DataError(
        f"data.partition.time names {name!r}, whose text is not all numbers or all ISO dates ({reasons[2]}): "
        "write times such as 2024-05-31T12:00:00, all with a time zone or all without"
    )
