"""The natural partition at another grain: several keys make one client, or a key with many rows makes several."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.columns import Coded, keys
from datasets_partition.core.dealing import at_least, joined, numbered
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class GroupedNatural:
    """`keys` values of the column `key` are one client, or values with more than `max_rows` rows are several.

    Values are grouped in sorted order. Where they do not come out even, `rest` says what becomes of the last ones:
    a `smaller` client, members of `bigger` groups (as even as can be), nobody's (`drop`), or an error (`refuse`):
    flwr-datasets' GroupedNaturalIdPartitioner with `sort_unique_ids`. With `max_rows`, the rows of a value are cut
    into as few parts as can be, in the source's order and as even as can be, named "value/0", "value/1", ...
    """

    kind: Literal["grouped_natural"] = "grouped_natural"
    key: str = "client"
    keys: int | None = None
    rest: Literal["smaller", "bigger", "drop", "refuse"] = "smaller"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a number below 1, or not either of `keys` and `max_rows`."""
        if (self.keys is None) == (self.max_rows is None):
            raise ValueError("data.partition needs either keys (for each client) or max_rows: give one of them")
        if self.keys is not None:
            at_least("keys", self.keys, 1)
        if self.max_rows is not None:
            at_least("max_rows", self.max_rows, 1)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Uses no randomness.

        Raises ValueError if the column has no key in a row, or too few keys for the groups, or names that would be
        the same after keys are split.
        """
        found = keys(table, "data.partition.key", self.key)
        if self.max_rows is not None:
            return split(found, self.max_rows)
        group = self._groups(len(found.values))
        return Assignment(group[found.codes], numbered(int(group.max()) + 1))

    def _groups(self, values: int) -> NDArray[np.int32]:
        """The group of each key, -1 for those that are dropped."""
        assert self.keys is not None
        whole, rest = divmod(values, self.keys)
        if (not whole and self.rest != "smaller") or (rest and self.rest == "refuse"):
            raise ValueError(
                f"data.partition.keys is {self.keys}, but {self.key!r} has {values} values, which make {whole} whole "
                f'groups and leave {rest}: choose another number, or rest = "smaller"'
            )
        if self.rest == "bigger":
            size, more = divmod(values, whole)
            return np.repeat(np.arange(whole, dtype=np.int32), size + (np.arange(whole) < more))
        groups = np.arange(values, dtype=np.int32) // np.int32(self.keys)
        if self.rest == "drop":
            groups[groups == whole] = -1
        return groups


def split(found: Coded, max_rows: int) -> Assignment:
    """The clients of `found`, and those with more than `max_rows` rows cut into several."""
    rows = np.bincount(found.codes, minlength=len(found.values))
    parts = -(-rows // max_rows)
    order = np.argsort(found.codes, kind="stable")
    within = np.arange(len(order)) - np.repeat(np.cumsum(rows) - rows, rows)
    # The rows i of n in m parts go to the part floor(i m / n), which makes the parts even.
    part = within * np.repeat(parts, rows) // np.repeat(rows, rows)
    clients = np.empty(len(order), np.int32)
    clients[order] = np.repeat(np.cumsum(parts) - parts, rows) + part
    owners = np.repeat(np.arange(len(parts)), parts)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(parts) - parts, parts)
    return Assignment(clients, joined(found.values, owners, pa.array(numbers).cast(pa.string())))
