"""The natural partition in coarser or finer clients: several keys make one, or a key with many rows makes several."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.columns import Coded, keys
from datasets_partition.core.dealing import at_least, even, joined, numbered, positions
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class GroupedNatural:
    """`keys` values of the column `key` are one client, or values with more than `max_rows` rows are several.

    Values are grouped in sorted order. Where `keys` does not divide their number, `rest` says what becomes of the last
    ones: a `smaller` client, members of `bigger` groups (as even as can be), nobody's (`drop`), or an error (`refuse`):
    flwr-datasets' GroupedNaturalIdPartitioner with `sort_unique_ids`. With `max_rows`, the rows of a value are cut
    into as few parts as can be, in the source's order and as even as can be, named "value/0", "value/1", ...
    """

    kind: Literal["grouped_natural"] = "grouped_natural"
    key: str = "client"
    keys: int | None = None
    rest: Literal["smaller", "bigger", "drop", "refuse"] = "smaller"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        """Raises DataError for a number below 1, or not either of `keys` and `max_rows`."""
        if (self.keys is None) == (self.max_rows is None):
            raise DataError("data.partition needs either keys (for each client) or max_rows: give one of them")
        at_least(1, keys=self.keys, max_rows=self.max_rows)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Uses no randomness.

        Raises DataError if a row has no key, there are too few keys for the groups, or split keys would have the same
        name.
        """
        coded = keys(table, "data.partition.key", self.key)
        if self.max_rows is not None:
            return split(coded, self.max_rows)
        group = self._groups(len(coded.values))
        return Assignment(group[coded.codes], numbered(int(group.max()) + 1))

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


def split(coded: Coded, max_rows: int) -> Assignment:
    """A client for each value, or several for a value with more than `max_rows` rows."""
    rows = np.bincount(coded.codes, minlength=len(coded.values))
    parts = -(-rows // max_rows)
    order = np.argsort(coded.codes, kind="stable")
    # Row i of n in m parts goes to the part floor(i m / n), which makes the parts even.
    part = positions(rows) * np.repeat(parts, rows) // np.repeat(rows, rows)
    clients = np.empty(len(order), np.int32)
    clients[order] = np.repeat(np.cumsum(parts) - parts, rows) + part
    owners = np.repeat(np.arange(len(parts)), parts)
    names = joined(coded.values, owners, pa.array(positions(parts)).cast(pa.string()))
    return Assignment(clients, names, people=coded.values.take(pa.array(owners)))
