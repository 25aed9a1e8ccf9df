"""The pathological partition: each client has rows of a few labels only."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import at_least, by_label, enough_rows, numbered, placed, positions
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment

# Random numbers in one block of clients, so that memory does not grow with clients times labels.
BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Pathological:
    """Each client has `classes` values of `label`; a value's rows are divided evenly over the clients that have it.

    `mode` says which values: `random`; `deterministic`, where client i has the values i, i + 1, ... in sorted order,
    starting over at the end; or `first_deterministic`, where client i has the value i, and others at random. Rows of a
    value that no client has are nobody's.

    Li et al. 2021 (arXiv 2102.02079, section 4.1), who fix the first value, and flwr-datasets' PathologicalPartitioner.
    """

    kind: Literal["pathological"] = "pathological"
    label: str
    clients: int
    classes: int = 2
    mode: Literal["random", "deterministic", "first_deterministic"] = "random"

    def __post_init__(self) -> None:
        """Raises DataError for a number below 1."""
        at_least(1, clients=self.clients, classes=self.classes)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError for too few labels, and for a label with fewer rows than clients."""
        coded = labels(table, "data.partition.label", self.label)
        enough_rows(self.clients, table.num_rows)
        if self.classes > len(coded.values):
            raise DataError(
                f"data.partition.classes is {self.classes}, but {self.label!r} has only {len(coded.values)} "
                f"values: ask for {len(coded.values)} or fewer"
            )
        order, label_rows = by_label(coded, rng)
        chosen = self._chosen(len(label_rows), rng)

        # A part for each label of each client, label after label.
        by_part_label = np.argsort(chosen.ravel(), kind="stable")
        part_label = chosen.ravel()[by_part_label]
        part_client = (by_part_label // self.classes).astype(np.int32)
        holders = np.bincount(part_label, minlength=len(label_rows))
        self._check(coded.values, label_rows, holders)
        size, rest = np.divmod(label_rows[part_label], holders[part_label])
        owners = np.repeat(part_client, size + (positions(holders) < rest))
        held = np.repeat(holders > 0, label_rows)
        clients = placed(np.append(order[held], order[~held]), owners)
        return Assignment(clients, numbered(self.clients), category=coded.texts())

    def _chosen(self, values: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The labels of each client, a row for each."""
        if self.mode == "deterministic":
            return (np.arange(self.clients)[:, None] + np.arange(self.classes)) % values
        blocks = []
        for first in range(0, self.clients, max(BLOCK // values, 1)):
            clients = np.arange(first, min(first + max(BLOCK // values, 1), self.clients))
            draws = rng.random((len(clients), values))
            if self.mode == "first_deterministic":
                draws[np.arange(len(clients)), clients % values] = -1.0
            blocks.append(np.argsort(draws, axis=1, kind="stable")[:, : self.classes])
        return np.concatenate(blocks)

    def _check(self, values: pa.StringArray, rows: NDArray[np.int64], holders: NDArray[np.int64]) -> None:
        if (rows < holders).any():
            short = int(np.argmax(holders - rows))
            raise DataError(
                f"data.partition gives the label {values[short].as_py()!r} to {holders[short]} clients, but it has "
                f"only {rows[short]} rows: ask for fewer clients or classes, or leave this label out of the source"
            )
