"""The partitions with skewed labels: Dirichlet shares of each label over clients, or of each client over labels."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core import dealing, draws
from datasets_partition.core.columns import Coded, labels
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment

# More tries are not worth their time: a try over a million clients takes seconds.
TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """The rows of each value of `label`, divided over `clients` clients in proportions drawn from Dirichlet(`alpha`).

    A small `alpha` gives a label to few clients; several numbers are one for each client, whose share grows with its
    number. With `balanced`, clients with more rows than the mean get none of the labels that follow. Proportions are
    drawn again until each client has `min_rows` rows; with `min_rows = 0` a client without rows is left out.
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
        dealing.at_least(1, clients=self.clients)
        dealing.above_zero(alpha=self.alpha)
        dealing.single_or_each("alpha", self.alpha, self.clients, "client")
        dealing.at_least(0, min_rows=self.min_rows)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if the column has no label in a row, or `min_rows` is not reached."""
        return self.divide(labels(table, "data.partition.label", self.label), rng)

    def divide(self, coded: Coded, rng: np.random.Generator) -> Assignment:
        """Divides rows whose labels are known already. Raises DataError if `min_rows` is not reached."""
        dealing.enough_rows(self.clients, len(coded.codes), self.min_rows)
        order, label_rows = dealing.by_label(coded, rng)
        best = -1
        for _ in range(TRIES):
            owners, smallest = self._draw(label_rows, rng)
            if smallest >= self.min_rows:
                clients, names = dealing.listed(dealing.placed(order, owners), dealing.numbered(self.clients))
                return Assignment(clients, names, category=coded.texts())
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
            counts = dealing.shared_out(rows, draws.exp(logs - logs.max()), rng.random())
            totals += counts
            parts.append(np.repeat(everyone, counts))
        return np.concatenate(parts), int(totals.min())


@dataclass(frozen=True, kw_only=True)
class InnerDirichlet:
    """Each client draws a mixture of the values of `label` from Dirichlet(`alpha`), then its rows by that mixture.

    Clients take rows one at a time, in random turns, until they have as many as `sizes` says, or equal shares of all
    rows. A label without rows left is taken out of every mixture. Several numbers as `alpha` are one for each label.
    Acar et al. 2021 (arXiv 2111.04263) and flwr-datasets' InnerDirichletPartitioner.
    """

    kind: Literal["inner_dirichlet"] = "inner_dirichlet"
    label: str
    clients: int | None = None
    sizes: tuple[int, ...] | None = None
    alpha: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        if (self.clients is None) == (not self.sizes):
            raise DataError("data.partition needs either clients or sizes: give one of them")
        dealing.at_least(1, clients=self.clients, sizes=min(self.sizes or (1,)))
        dealing.above_zero(alpha=self.alpha)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError if a row has no label, or there are too few rows."""
        coded = labels(table, "data.partition.label", self.label)
        if self.sizes:
            sizes = dealing.given_sizes(self.sizes, table.num_rows)
        else:
            assert self.clients is not None
            dealing.enough_rows(self.clients, table.num_rows)
            sizes = dealing.even(table.num_rows, self.clients)
        order, label_rows = dealing.by_label(coded, rng)
        dealing.single_or_each("alpha", self.alpha, len(label_rows), "label")
        logs = draws.log_gamma(rng, self.alpha, len(sizes) * len(label_rows)).reshape(len(sizes), -1)
        turns = _turns(sizes, rng)
        drawn = _drawn(logs, label_rows, turns, rng)

        clients = np.full(table.num_rows, -1, np.int32)
        by_drawn = np.argsort(drawn, kind="stable")
        taken = np.bincount(drawn, minlength=len(label_rows))
        starts = np.cumsum(label_rows) - label_rows
        clients[order[np.repeat(starts, taken) + dealing.positions(taken)]] = turns[by_drawn]
        return Assignment(clients, dealing.numbered(len(sizes)), category=coded.texts())


def _turns(sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int32]:
    """The client of each turn, any that is not full: the order in which Poisson clocks ring, one a client."""
    clients = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rings = np.cumsum(-draws.log(1 - rng.random(len(clients))))
    before = np.append(0.0, rings)[np.cumsum(sizes) - sizes]
    turns: NDArray[np.int32] = clients[np.argsort(rings - before[clients], kind="stable")]
    return turns


def _drawn(
    logs: NDArray[np.float64], label_rows: NDArray[np.int64], turns: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.uint32]:
    """The label drawn at each turn, where no label is drawn more often than it has rows.

    All turns are drawn at once. The label that runs out first has its later draws drawn again without it; later draws
    of other labels stand, since on the condition that they are others they follow the mixture without it already.
    """
    is_open = np.ones(len(label_rows), np.bool_)
    drawn = _by_mixture(logs, is_open, turns, rng)
    while True:
        by_label = np.argsort(drawn, kind="stable")
        counts = np.bincount(drawn, minlength=len(label_rows))
        starts = np.cumsum(counts) - counts
        over = np.flatnonzero(counts > label_rows)
        if not len(over):
            return drawn
        first = over[np.argmin(by_label[starts[over] + label_rows[over]])]
        again = by_label[starts[first] + label_rows[first] : starts[first] + counts[first]]
        is_open[first] = False
        drawn[again] = _by_mixture(logs, is_open, turns[again], rng)


def _by_mixture(
    logs: NDArray[np.float64], is_open: NDArray[np.bool_], turns: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.uint32]:
    involved, rows = np.unique(turns, return_inverse=True)
    edges = np.empty((len(involved), len(is_open)))
    step = max(1, draws.BLOCK // len(is_open))  # clients in a block: the exponential takes several times their memory
    for first in range(0, len(involved), step):
        some = np.where(is_open, logs[involved[first : first + step]], -np.inf)
        weights = draws.exp((some - some.max(axis=1, keepdims=True)).ravel()).reshape(some.shape)
        np.cumsum(weights, axis=1, out=edges[first : first + step])
    points = rng.random(len(turns)) * edges[rows, -1]
    drawn = np.zeros(len(turns), np.uint32)
    for label in range(len(is_open) - 1):
        drawn += points >= edges[rows, label]
    return np.minimum(drawn, np.uint32(np.flatnonzero(is_open)[-1]))  # a product may round up to the last edge
