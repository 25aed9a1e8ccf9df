"""The pathological partition: each client has rows of a few labels only."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import at_least, by_label, enough_rows, numbered
from datasets_partition.core.types import Assignment

# Random numbers at a time: clients are drawn in blocks, so that memory does not grow with clients times labels.
BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Pathological:
    """Each client has `classes` values of `label`; a value's rows are divided evenly over the clients that have it.

    Which ones: `random`; `deterministic`, client i has the values i, i + 1, ... in sorted order, starting over at the
    end; or `first_deterministic`, client i has the value i, and others at random. Rows of a value that fell to no
    client are nobody's.

    Li et al. 2021 (arXiv 2102.02079, section 4.1), who have the first one fixed, and flwr-datasets'
    PathologicalPartitioner.
    """

    kind: Literal["pathological"] = "pathological"
    label: str
    clients: int
    classes: int = 2
    mode: Literal["random", "deterministic", "first_deterministic"] = "random"

    def __post_init__(self) -> None:
        """Raises ValueError for a number below 1."""
        at_least("clients", self.clients, 1)
        at_least("classes", self.classes, 1)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises ValueError for too few labels, and for a label with fewer rows than clients that are to have it."""
        found = labels(table, "data.partition.label", self.label)
        enough_rows(self.clients, table.num_rows)
        if self.classes > len(found.values):
            raise ValueError(
                f"data.partition.classes is {self.classes}, but {self.label!r} has only {len(found.values)} "
                f"values: ask for {len(found.values)} or fewer"
            )
        order, label_rows = by_label(found, rng)
        chosen = self._chosen(len(label_rows), rng)

        # One part for each label that each client has, label after label.
        by_part_label = np.argsort(chosen.ravel(), kind="stable")
        part_label = chosen.ravel()[by_part_label]
        part_client = (by_part_label // self.classes).astype(np.int32)
        holders = np.bincount(part_label, minlength=len(label_rows))
        self._check(found.values, label_rows, holders)
        number = np.arange(len(part_label)) - (np.cumsum(holders) - holders)[part_label]
        size, rest = np.divmod(label_rows[part_label], holders[part_label])
        owners = np.repeat(part_client, size + (number < rest))

        held = np.repeat(holders > 0, label_rows)
        clients = np.full(table.num_rows, -1, np.int32)
        clients[order[held]] = owners
        return Assignment(clients, numbered(self.clients), category=found.texts())

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
            raise ValueError(
                f"data.partition gives the label {values[short].as_py()!r} to {holders[short]} clients, but it has "
                f"only {rows[short]} rows: ask for fewer clients or classes, or leave this label out of the source"
            )
