"""The rows and the clients that are kept from training, and rows with the same content on both sides."""

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.dealing import positions
from datasets_partition.core.types import DataError


class Held(NamedTuple):
    """One array over the rows, two over the clients; who is not `kept` takes part in nothing."""

    heldout: NDArray[np.bool_]
    unseen: NDArray[np.bool_]
    kept: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Shares kept from training: `heldout` of each training client's rows, and `unseen` of the people, whole.

    A person is a client, or all clients that a partition cuts one person's rows into. A share `server` of all rows is
    the server's. Clients with fewer than `min_rows` rows are left out before people are drawn. `draw` holds out random
    rows of a client, or the last in the partition's order. Of rows with the same content the first stays, unless
    `duplicates` keeps all; content that is then trained and held out is an error, unless `leaks` allows it.
    """

    heldout: float = 0.1
    unseen: float = 0.1
    server: float = 0.0
    min_rows: int = 1
    draw: Literal["random", "last"] = "random"
    duplicates: Literal["drop", "keep"] = "drop"
    leaks: Literal["error", "allow"] = "error"

    def __post_init__(self) -> None:
        for name, share in (("heldout", self.heldout), ("unseen", self.unseen), ("server", self.server)):
            if not 0 <= share < 1:
                raise DataError(f"data.splits.{name} is {share}: give a share from 0 up to, but not including, 1")
        if self.min_rows < 1:
            raise DataError(f"data.splits.min_rows is {self.min_rows}: give 1 or more")

    def server_rows(self, rows: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Draws the server's rows among `rows`: their share, rounded to the nearest count."""
        drawn = np.zeros(rows, dtype=np.bool_)
        drawn[rng.permutation(rows)[: _nearest(self.server * rows)]] = True
        return drawn

    def assign(self, clients: NDArray[np.int32], people: NDArray[np.int64], rng: np.random.Generator) -> Held:
        """Decides for rows in the partition's order, whose clients are `clients` (one int32 a row).

        `people` numbers each client's person: all clients of a person are unseen, or none. Counts are rounded, halves
        up, but each client keeps a training row, and a person trains. DataError if no client has `min_rows` rows.
        """
        rows = np.bincount(clients, minlength=len(people))
        kept = rows >= self.min_rows
        if not kept.any():
            raise DataError(
                f"data.splits.min_rows is {self.min_rows}, but no client has more than {rows.max()} rows: lower it"
            )
        candidates = np.unique(people[kept])
        drawn = min(_nearest(self.unseen * len(candidates)), len(candidates) - 1)
        unseen = kept & np.isin(people, rng.permutation(candidates)[:drawn])
        held = np.minimum(_nearest(self.heldout * rows), np.maximum(rows - 1, 0))
        held = np.where(kept, np.where(unseen, rows, held), 0)
        # Each client's rows in a random order, or from the last to the first: the first ones of each are held out.
        turn = rng.permutation(len(clients)) if self.draw == "random" else -np.arange(len(clients))
        heldout = np.empty(len(clients), dtype=np.bool_)
        heldout[np.lexsort((turn, clients))] = positions(rows) < np.repeat(held, rows)
        return Held(heldout, unseen, kept)


def _nearest(counts: Any) -> Any:
    return np.floor(counts + 0.5).astype(np.int64)  # np.rint would round 0.5 to 0 and 1.5 to 2


def content_numbers(table: pa.Table, columns: tuple[str, ...]) -> NDArray[np.int64]:
    """A number for each row, equal where and only where rows agree in all `columns`: compared, not hashed."""
    numbers, contents = np.zeros(table.num_rows, dtype=np.int64), 1
    for name in columns:
        if contents == len(numbers):
            break  # all rows differ already
        values = table[name].combine_chunks()
        if pa.types.is_nested(values.type):
            values = pa.array([json.dumps(value) for value in values.to_pylist()], pa.large_string())
        codes, different = _coded(values)
        # Both are at most the number of rows, so that the product does not overflow.
        numbers, contents = _coded(pa.array(numbers * different + codes))
    return numbers


def _coded(values: pa.Array) -> tuple[NDArray[np.int64], int]:
    """The number of each row's value, and how many values differ."""
    encoded = values.dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)


def first_of_each(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the first row of each content, ascending."""
    return np.sort(np.unique(numbers, return_index=True)[1])


def refuse_leaks(
    table: pa.Table, numbers: NDArray[np.int64], trained: NDArray[np.bool_], columns: tuple[str, ...]
) -> None:
    """Raises DataError if a row that is not `trained` has the content of a row that is."""
    leaking = np.flatnonzero(~trained & np.isin(numbers, numbers[trained]))
    if len(leaking):
        example = " | ".join(str(table[name][int(leaking[0])].as_py()) for name in columns)
        raise DataError(
            f"{len(leaking)} held-out rows have the content of training rows, such as {example[:80]!r}: remove them by "
            f'data.splits.duplicates = "drop", or accept the leak by data.splits.leaks = "allow"'
        )
