"""The partitions by a number or by text length: each client has rows of a range of it, sharp or blurred by noise."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core import draws
from datasets_partition.core.columns import numbers, texts
from datasets_partition.core.dealing import at_least, dealt, enough_rows, even, numbered, text_columns
from datasets_partition.core.types import Assignment, DataError


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """Rows sorted by the number in `column`, with noise, and cut into `clients` parts that differ by at most one row.

    They are sorted by s z + (1 - s) e, where s is `strictness`, z the number less its mean over its standard deviation,
    and e a standard normal draw: 1 sorts by the number alone, 0 is even. flwr-datasets' ContinuousPartitioner.
    """

    kind: Literal["continuous"] = "continuous"
    column: str
    clients: int
    strictness: float = 1.0

    def __post_init__(self) -> None:
        _check(self.clients, self.strictness)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if the column holds no finite numbers, or the same in all rows, or for too few rows."""
        return _sorted_out(numbers(table, "data.partition.column", self.column), self.clients, self.strictness, rng)


@dataclass(frozen=True, kw_only=True)
class ByLength:
    """Like `Continuous`, by the characters of each row's text in `columns`, or of its content: shortest rows first."""

    kind: Literal["length"] = "length"
    clients: int
    columns: tuple[str, ...] | None = None
    strictness: float = 1.0

    def __post_init__(self) -> None:
        _check(self.clients, self.strictness)
        text_columns(self.columns, "is measured")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if a column is not text, all rows have one length, or there are more clients than rows."""
        lengths = np.zeros(table.num_rows)
        for text in texts(table, self.columns):
            lengths += pc.utf8_length(text).to_numpy()
        return _sorted_out(lengths, self.clients, self.strictness, rng)


def _check(clients: int, strictness: float) -> None:
    at_least(1, clients=clients)
    if not 0 <= strictness <= 1:
        raise DataError(f"data.partition.strictness is {strictness}: give a number from 0 (even) to 1 (sorted)")


def _sorted_out(values: NDArray[np.float64], clients: int, strictness: float, rng: np.random.Generator) -> Assignment:
    """The rule of `Continuous`; rows with equal values are in a random order."""
    enough_rows(clients, len(values))
    spread = values.std()
    if strictness > 0 and spread == 0:
        raise DataError(
            f"data.partition sorts rows by a number that is {values[0]:g} in all of them: "
            'choose another column, or use kind = "iid"'
        )
    order = rng.permutation(len(values))
    blurred = (1 - strictness) * draws.normal(rng, len(values))
    if strictness > 0:
        blurred += strictness * ((values - values.mean()) / spread)[order]
    parts = dealt(order[np.argsort(blurred, kind="stable")], even(len(values), clients))
    return Assignment(parts, numbered(clients))
