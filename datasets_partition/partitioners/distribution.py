"""The partition that is written out: which client gets which share of which label."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import by_label, numbered, shared_out
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """For each value of `label`, the shares of its rows that the clients get, one number a client.

    Only the proportions within a label count, so that shares may also be numbers of rows. Each share is met to less
    than a row. flwr-datasets' DistributionPartitioner with the array written out over all clients; that one rounds
    shares down and gives what is left over of a label to one client.
    """

    kind: Literal["distribution"] = "distribution"
    label: str
    shares: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        """Raises ValueError for shares that are negative, all 0, or not of the same number of clients."""
        if not self.shares:
            raise ValueError("data.partition.shares is empty: give each label a list with one share a client")
        if len({len(row) for row in self.shares.values()}) > 1:
            raise ValueError("data.partition.shares has lists of different lengths: give one share a client for each")
        for value, row in self.shares.items():
            if not all(0 <= share < float("inf") for share in row) or not any(row):
                raise ValueError(
                    f"data.partition.shares of {value!r} is {list(row)}: give numbers from 0 up, and one above 0"
                )
        if empty := [
            client for client, shares in enumerate(zip(*self.shares.values(), strict=True)) if not any(shares)
        ]:
            raise ValueError(f"data.partition.shares gives client {empty[0]} nothing: give it a share, or take it out")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises ValueError if rows and shares differ in their labels, or a client's shares round to no row."""
        found = labels(table, "data.partition.label", self.label)
        values = found.values.to_pylist()
        if missing := [value for value in values if value not in self.shares]:
            raise ValueError(
                f"data.partition.shares has no {missing[0]!r}, which rows have as {self.label!r}: "
                f"give shares for each of {', '.join(values)}"
            )
        if empty := [value for value in self.shares if value not in values]:
            raise ValueError(
                f"data.partition.shares has {empty[0]!r}, which no row has as {self.label!r}: take it out, "
                f"there are {', '.join(values)}"
            )
        order, label_rows = by_label(found, rng)
        counts = np.stack(
            [
                shared_out(rows, np.array(self.shares[value], dtype=np.float64))
                for value, rows in zip(values, label_rows.tolist(), strict=True)
            ]
        )
        if not (totals := counts.sum(axis=0)).all():
            raise ValueError(
                f"data.partition.shares gives client {int(np.argmin(totals))} less than a row of each label: "
                "raise its shares"
            )
        everyone = np.tile(np.arange(len(totals), dtype=np.int32), len(values))
        clients = np.empty(table.num_rows, np.int32)
        clients[order] = np.repeat(everyone, counts.ravel())
        return Assignment(clients, numbered(len(totals)), category=found.texts())
