"""The partition that a recipe spells out: which client gets which share of which label."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import by_label, numbered, placed, shared_out
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """For each value of `label`, the shares of its rows that the clients get, one number a client.

    Only the proportions within a label count, so shares may also be numbers of rows. Each share is met to less than a
    row. flwr-datasets' DistributionPartitioner with the array for all clients, which rounds shares down and gives the
    rest of a label to one client.
    """

    kind: Literal["distribution"] = "distribution"
    label: str
    shares: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        """Raises DataError for shares that are negative, all 0, or not of the same number of clients."""
        if not self.shares:
            raise DataError("data.partition.shares is empty: give each label a list with one share a client")
        if len({len(row) for row in self.shares.values()}) > 1:
            raise DataError("data.partition.shares has lists of different lengths: give one share a client for each")
        for value, row in self.shares.items():
            if not all(0 <= share < float("inf") for share in row) or not any(row):
                raise DataError(
                    f"data.partition.shares of {value!r} is {list(row)}: give numbers from 0 up, and one above 0"
                )
        for client, shares in enumerate(zip(*self.shares.values(), strict=True)):
            if not any(shares):
                raise DataError(f"data.partition.shares gives client {client} nothing: give it a share, or take it out")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if rows and shares differ in their labels, or a client's shares round to no row."""
        coded = labels(table, "data.partition.label", self.label)
        values = coded.values.to_pylist()
        if missing := [value for value in values if value not in self.shares]:
            raise DataError(
                f"data.partition.shares has no {missing[0]!r}, which rows have as {self.label!r}: "
                f"give shares for each of {', '.join(values)}"
            )
        if empty := [value for value in self.shares if value not in values]:
            raise DataError(
                f"data.partition.shares has {empty[0]!r}, which no row has as {self.label!r}: take it out, "
                f"there are {', '.join(values)}"
            )
        order, label_rows = by_label(coded, rng)
        shares = (np.array(self.shares[value], dtype=np.float64) for value in values)
        counts = np.stack([shared_out(rows, row) for rows, row in zip(label_rows.tolist(), shares, strict=True)])
        if not (totals := counts.sum(axis=0)).all():
            raise DataError(
                f"data.partition.shares gives client {int(np.argmin(totals))} less than a row of each label: "
                "raise its shares"
            )
        everyone = np.tile(np.arange(len(totals), dtype=np.int32), len(values))
        clients = placed(order, np.repeat(everyone, counts.ravel()))
        return Assignment(clients, numbered(len(totals)), category=coded.texts())
