"""The partition that is skewed in labels: each label's rows are divided in proportions drawn from a Dirichlet law."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core import draws
from datasets_partition.core.columns import Coded, labels
from datasets_partition.core.dealing import (
    above_zero,
    at_least,
    by_label,
    enough_rows,
    listed,
    numbered,
    placed,
    shared_out,
    single_or_each,
)
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment

# More tries are not worth their time: a try over a million clients takes seconds.
TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """The rows of each value of `label`, divided over `clients` clients in proportions drawn from Dirichlet(`alpha`).

    A small `alpha` gives a label to few clients, a large one gives every client the same mixture; several numbers are
    one for each client, whose share grows with its number. With `balanced`, clients that already have more rows than
    the mean get none of the labels that follow. Proportions are drawn again until each client has `min_rows` rows;
    with `min_rows = 0` a client without rows is left out.

    Yurochkin et al. 2019 (arXiv 1905.12022, section 4) and flwr-datasets' DirichletPartitioner, which rounds each cut
    down and so favors the last client; here the cuts are unbiased.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    label: str
    clients: int
    alpha: float | tuple[float, ...] = 0.5
    min_rows: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        """Raises DataError for a number that is too small."""
        at_least(1, clients=self.clients)
        above_zero(alpha=self.alpha)
        single_or_each("alpha", self.alpha, self.clients, "client")
        at_least(0, min_rows=self.min_rows)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if the column has no label in a row, or `min_rows` is not reached."""
        return self.divide(labels(table, "data.partition.label", self.label), rng)

    def divide(self, coded: Coded, rng: np.random.Generator) -> Assignment:
        """Divides rows whose labels are known already. Raises DataError if `min_rows` is not reached."""
        enough_rows(self.clients, len(coded.codes), self.min_rows)
        order, label_rows = by_label(coded, rng)
        best = -1
        for _ in range(TRIES):
            owners, smallest = self._draw(label_rows, rng)
            if smallest >= self.min_rows:
                return Assignment(*listed(placed(order, owners), numbered(self.clients)), category=coded.texts())
            best = max(best, smallest)
        leaves = "" if best else " (which leaves clients without rows out)"
        raise DataError(
            f"data.partition.min_rows is {self.min_rows}, but in {TRIES} tries with alpha = {self.alpha} the smallest "
            f"of {self.clients} clients had {best} rows at best: lower min_rows to {best}{leaves}, raise alpha, or ask "
            f"for fewer clients"
        )

    def _draw(self, label_rows: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int32], int]:
        """The owners of the rows, label after label, and the number of rows of the smallest client."""
        everyone = np.arange(self.clients, dtype=np.int32)
        totals = np.zeros(self.clients, np.int64)
        parts = []
        for rows in label_rows.tolist():
            logs = draws.log_gamma(rng, self.alpha, self.clients)
            if self.balanced:
                logs[totals * self.clients > label_rows.sum()] = -np.inf
            counts = shared_out(rows, draws.exp(logs - logs.max()), rng.random())
            totals += counts
            parts.append(np.repeat(everyone, counts))
        return np.concatenate(parts), int(totals.min())
