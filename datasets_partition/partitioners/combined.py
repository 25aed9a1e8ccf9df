"""Two partitions, one after the other: such as the natural clients, and then a cap on their rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

import datasets_partition
from datasets_partition.core.dealing import joined
from datasets_partition.core.types import Assignment
from datasets_partition.partitioners.size_cap import SizeCap


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The partition `first`, each of whose clients is partitioned by `then`.

    Clients are named "first/then", or as in `first` where `then` makes one of them. Category and order are those of
    `then` where it has any, otherwise those of `first`. A `SizeCap` is put on all clients of `first` at once; any
    other `then` takes one call for each of them, and so minutes where there are a million.
    """

    kind: Literal["combined"] = "combined"
    # The union of all kinds holds this class. By its full name it is found when it is needed, after this file.
    first: Annotated["datasets_partition.Partitioners", Field(discriminator="kind")]
    then: Annotated["datasets_partition.Partitioners", Field(discriminator="kind")]

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises ValueError where `first` does, `then` does for a client, or two clients would have one name."""
        with _named("data.partition.first"):
            first = self.first.assign(table, rng)
        # In the order that `first` keeps, so that parts of a client in time are stretches of time.
        in_order = np.arange(table.num_rows) if first.order is None else first.order
        order = np.lexsort((in_order, first.clients))
        counts = np.bincount(first.clients + 1, minlength=len(first.names) + 1)
        if isinstance(self.then, SizeCap):
            return _capped(first, order[counts[0] :], counts[1:], self.then, rng)
        pieces = np.split(order, np.cumsum(counts)[:-1])[1:]  # the first piece is nobody's

        clients = np.full(table.num_rows, -1, np.int32)
        owners: list[int] = []
        names: list[str] = []
        parts = []
        for number, rows in enumerate(pieces):
            whose = f"for the client {first.names[number].as_py()!r} of data.partition.first: "
            with _named("data.partition.then", whose):
                part = self.then.assign(table.take(rows), rng)
            clients[rows] = np.where(part.clients < 0, -1, part.clients + len(names))
            owners += [number] * len(part.names)
            names += part.names.to_pylist()
            parts.append(part)

        category, ranks = first.category, first.order
        owned = order[counts[0] :]
        if parts and parts[0].category is not None:
            found = np.full(table.num_rows, -1)
            found[owned] = np.arange(len(owned))
            # What is nobody's after `first` has no category: it was not asked for.
            category = pa.concat_arrays([part.category for part in parts]).take(pa.array(found, mask=found < 0))
        if parts and parts[0].order is not None:
            ranks = np.zeros(table.num_rows, np.int64)
            ranks[owned] = np.concatenate([part.order for part in parts])
        return Assignment(
            clients, joined(first.names, np.array(owners, np.int64), pa.array(names, pa.string())), category, ranks
        )


@contextmanager
def _named(place: str, where: str = "") -> Iterator[None]:
    """Lets an error that the block raises name the keys where they stand."""
    try:
        yield
    except ValueError as error:
        raise ValueError(where + str(error).replace("data.partition", place)) from None


def _capped(
    first: Assignment, owned: NDArray[np.int64], counts: NDArray[np.int64], cap: SizeCap, rng: np.random.Generator
) -> Assignment:
    """What `cap` makes of each client of `first`, by the same law; `owned` are the rows, client after client."""
    clients = np.full(len(first.clients), -1, np.int32)
    if cap.surplus == "drop":
        if counts.max(initial=0) > cap.rows:
            owned = owned[rng.permutation(len(owned))]
            owned = owned[np.argsort(first.clients[owned], kind="stable")]
        kept = _within(counts) < cap.rows
        clients[owned[kept]] = first.clients[owned[kept]]
        return Assignment(clients, first.names, first.category, first.order)
    parts = -(-counts // cap.rows)
    owners, numbers = np.repeat(np.arange(len(parts)), parts), _within(parts)
    size, rest = np.divmod(counts, np.maximum(parts, 1))
    clients[owned] = np.repeat(np.arange(len(owners), dtype=np.int32), size[owners] + (numbers < rest[owners]))
    # Padded as the client's highest number is long.
    widths = pc.utf8_length(pa.array(parts - 1).cast(pa.string())).to_numpy()[owners]
    names = pa.array(numbers).cast(pa.string())
    for width in np.unique(widths[widths > 1]).tolist():
        names = pc.if_else(pa.array(widths == width), pc.utf8_lpad(names, width, "0"), names)
    return Assignment(clients, joined(first.names, owners, names), first.category, first.order)


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers from 0 up to each count, one count after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
