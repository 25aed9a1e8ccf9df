"""The union of all partitions, and two of them in a row: such as the natural clients, and then a cap on their rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from datasets_partition.core.dealing import joined, positions
from datasets_partition.core.types import Assignment, DataError, Partitioner
from datasets_partition.partitioners.by_label import Dirichlet, Distribution, InnerDirichlet, Pathological, Shards
from datasets_partition.partitioners.by_size import BySize, Iid, SizeCap
from datasets_partition.partitioners.by_topic import ByTopic
from datasets_partition.partitioners.continuous import ByLength, Continuous
from datasets_partition.partitioners.natural import ByTime, GroupedNatural, Natural


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The partition `first`, each of whose clients is partitioned by `then`.

    Clients are named "first/then", or as in `first` where `then` makes one client. Category and order are `then`'s
    where it has any. The people are the values of the first natural key, or without one the clients of `first`. A
    `SizeCap` as `then` is applied to all clients at once; any other takes a call each, minutes for a million of them.
    """

    kind: Literal["combined"] = "combined"
    first: Annotated["Partitioners", Field(discriminator="kind")]
    then: Annotated["Partitioners", Field(discriminator="kind")]

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError where `first` does, `then` does for a client, or two clients would have the same name."""
        with _renamed_keys("data.partition.first"):
            first = self.first.assign(table, rng)
        # In the order that `first` keeps, so that parts of a client in time are stretches of time.
        order = np.arange(table.num_rows) if first.order is None else first.order
        counts = np.bincount(first.clients + 1, minlength=len(first.names) + 1)
        owned = np.lexsort((order, first.clients))[counts[0] :]  # the first rows are nobody's
        if isinstance(self.then, SizeCap):
            return _capped(first, owned, counts[1:], self.then, rng)
        clients, known = np.full(table.num_rows, -1, np.int32), 0
        parts: list[Assignment] = []
        for number, rows in enumerate(np.split(owned, np.cumsum(counts[1:])[:-1])):
            client = f"for the client {first.names[number].as_py()!r} of data.partition.first: "
            with _renamed_keys("data.partition.then", client):
                part = self.then.assign(table.take(rows), rng)
            clients[rows] = np.where(part.clients < 0, -1, part.clients + known)
            parts.append(part)
            known += len(part.names)
        category, ranks = first.category, first.order
        if parts[0].category is not None:
            place = np.full(table.num_rows, -1)
            place[owned] = np.arange(len(owned))
            # The rows that `first` gave to nobody have no category: `then` has not seen them.
            category = pa.concat_arrays([part.category for part in parts]).take(pa.array(place, mask=place < 0))
        if parts[0].order is not None:
            ranks = np.zeros(table.num_rows, np.int64)
            ranks[owned] = np.concatenate([part.order for part in parts])
        owners = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts])
        names = joined(first.names, owners, pa.concat_arrays([part.names.cast(pa.string()) for part in parts]))
        if not natural(self.first) and natural(self.then):
            people = pa.concat_arrays([_people(part) for part in parts])
        else:
            people = _people(first).take(pa.array(owners))
        return Assignment(clients, names, category, ranks, people)


ByKey = Natural | GroupedNatural | ByTime
ByLabel = Dirichlet | InnerDirichlet | Shards | Pathological | Distribution
# The registry: a recipe's `data.partition` names one of these by its `kind`.
Partitioners = ByKey | Iid | BySize | SizeCap | ByLabel | Continuous | ByLength | ByTopic | Combined


@contextmanager
def _renamed_keys(place: str, where: str = "") -> Iterator[None]:
    """Makes an error of the block name the keys where they stand in the recipe."""
    try:
        yield
    except DataError as error:
        raise DataError(where + str(error).replace("data.partition", place)) from None


def _capped(
    first: Assignment, owned: NDArray[np.int64], counts: NDArray[np.int64], cap: SizeCap, rng: np.random.Generator
) -> Assignment:
    """Applies `cap` to each client of `first`, as `SizeCap` does to a table; `owned` are the rows by client."""
    clients = np.full(len(first.clients), -1, np.int32)
    if cap.surplus == "drop":
        if counts.max(initial=0) > cap.rows:
            owned = owned[rng.permutation(len(owned))]
            owned = owned[np.argsort(first.clients[owned], kind="stable")]
        kept = owned[positions(counts) < cap.rows]
        clients[kept] = first.clients[kept]
        return first._replace(clients=clients)
    parts = -(-counts // cap.rows)
    owners, numbers = np.repeat(np.arange(len(parts)), parts), positions(parts)
    size, rest = np.divmod(counts, np.maximum(parts, 1))
    clients[owned] = np.repeat(np.arange(len(owners), dtype=np.int32), size[owners] + (numbers < rest[owners]))
    # Padded to the length of the client's highest number, so that they sort.
    then = [str(number).zfill(len(str(most - 1))) for number, most in zip(numbers, parts[owners], strict=True)]
    names = joined(first.names, owners, pa.array(then, pa.string()))
    return Assignment(clients, names, first.category, first.order, _people(first).take(pa.array(owners)))


def _people(assignment: Assignment) -> pa.StringArray:
    return assignment.names if assignment.people is None else assignment.people


def parts_of(part: Any) -> Iterator[Any]:
    """A source or partition and the dataclasses inside it, such as the two of a `Combined`, in their order."""
    if is_dataclass(part):
        yield part
        for key in fields(part):
            yield from parts_of(getattr(part, key.name))


def natural(partitioner: Partitioner) -> ByKey | None:
    """The first part of a partition that goes by a natural key."""
    return next(iter(naturals(partitioner)), None)


def naturals(partitioner: Partitioner) -> list[ByKey]:
    """The parts of a partition that go by natural keys."""
    return [part for part in parts_of(partitioner) if isinstance(part, ByKey)]


def unit_of(partitioner: Partitioner, most: int, largest: int, columns: list[str]) -> str | None:
    """What a client is where it is not one person.

    People have up to `most` clients, clients up to `largest` rows, more than a cap where prompts stay whole; `columns`
    are those of the table.
    """
    keyed = natural(partitioner)
    grouped = isinstance(keyed, GroupedNatural) and keyed.keys is not None
    if keyed is not None:
        person = f"{'a group of values' if grouped else 'one value'} of the column {keyed.key!r}"
    else:
        person = "one client of data.partition.first" if isinstance(partitioner, Combined) else "one person"
    if most > 1:
        parts = list(parts_of(partitioner))
        caps = [part.rows for part in parts if isinstance(part, SizeCap)]
        caps += [part.max_rows for part in parts if isinstance(part, GroupedNatural) and part.max_rows is not None]
        capped = f" of at most {max(min(caps), largest)} rows" if caps else ""
        return f"a part{capped} of {person}, of up to {most} parts"
    if keyed is None and "client" in columns:
        return "rows that the partition deals out whatever their column 'client'"
    return person if grouped else None
