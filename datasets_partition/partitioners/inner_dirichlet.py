"""The partition of given sizes that is skewed in labels: each client draws its own mixture of labels."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core import draws
from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import above_zero, at_least, by_label, enough_rows, even, numbered, one_or_each
from datasets_partition.core.types import Assignment


@dataclass(frozen=True, kw_only=True)
class InnerDirichlet:
    """Each client draws a mixture of the values of `label` from Dirichlet(`alpha`), then its rows by that mixture.

    Clients take rows one at a time, in random turns, until they have as many as `sizes` says, or equal shares of all
    rows among `clients`. A label that has run out is taken out of every mixture. Rows beyond the sizes are nobody's.
    Several numbers as `alpha` are one for each label, in the order of the labels.

    Acar et al. 2021 (arXiv 2111.04263) and flwr-datasets' InnerDirichletPartitioner.
    """

    kind: Literal["inner_dirichlet"] = "inner_dirichlet"
    label: str
    clients: int | None = None
    sizes: tuple[int, ...] | None = None
    alpha: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for a number that is too small, or not either of `clients` and `sizes`."""
        if (self.clients is None) == (not self.sizes):
            raise ValueError("data.partition needs either clients or sizes: give one of them")
        if self.clients is not None:
            at_least("clients", self.clients, 1)
        if self.sizes:
            at_least("sizes", min(self.sizes), 1)
        above_zero("alpha", self.alpha)

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises ValueError if the column has no label in a row, or there are too few rows."""
        found = labels(table, "data.partition.label", self.label)
        if self.sizes:
            sizes = np.array(self.sizes, dtype=np.int64)
            if sizes.sum() > table.num_rows:
                raise ValueError(
                    f"data.partition.sizes adds up to {sizes.sum()}, but there are only {table.num_rows} distinct "
                    "rows: lower the sizes"
                )
        else:
            assert self.clients is not None
            enough_rows(self.clients, table.num_rows)
            sizes = even(table.num_rows, self.clients)
        order, label_rows = by_label(found, rng)
        one_or_each("alpha", self.alpha, len(label_rows), "label")
        logs = draws.log_gamma(rng, self.alpha, len(sizes) * len(label_rows)).reshape(len(sizes), -1)
        turns = _turns(sizes, rng)
        drawn = _drawn(logs, label_rows, turns, rng)

        clients = np.full(table.num_rows, -1, np.int32)
        by_drawn = np.argsort(drawn, kind="stable")
        taken = np.bincount(drawn, minlength=len(label_rows))
        starts = np.cumsum(label_rows) - label_rows
        within = np.arange(len(turns)) - np.repeat(np.cumsum(taken) - taken, taken)
        clients[order[np.repeat(starts, taken) + within]] = turns[by_drawn]
        return Assignment(clients, numbered(len(sizes)), category=found.texts())


def _turns(sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int32]:
    """Whose turn it is, as often as each has rows to take, if each turn falls on any client that is not yet full.

    That is the order in which independent Poisson clocks ring, one a client, each until its client is full.
    """
    clients = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rings = np.cumsum(-draws.log(1 - rng.random(len(clients))))
    before = np.append(0.0, rings)[np.cumsum(sizes) - sizes]
    turns: NDArray[np.int32] = clients[np.argsort(rings - before[clients], kind="stable")]
    return turns


def _drawn(
    logs: NDArray[np.float64], label_rows: NDArray[np.int64], turns: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.uint32]:
    """The label drawn at each turn, where none is drawn more often than it has rows.

    All are drawn at once. Where a label runs out first, its later draws are drawn again without it; the later draws
    of other labels stand, since given that they are others they follow the mixture without it already.
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
    involved, who = np.unique(turns, return_inverse=True)
    edges = np.empty((len(involved), len(is_open)))
    step = max(1, draws.BLOCK // len(is_open))  # clients at a time: the exponential takes several times their memory
    for first in range(0, len(involved), step):
        some = np.where(is_open, logs[involved[first : first + step]], -np.inf)
        weights = draws.exp((some - some.max(axis=1, keepdims=True)).ravel()).reshape(some.shape)
        np.cumsum(weights, axis=1, out=edges[first : first + step])
    points = rng.random(len(turns)) * edges[who, -1]
    drawn = np.zeros(len(turns), np.uint32)
    for label in range(len(is_open) - 1):
        drawn += points >= edges[who, label]
    return np.minimum(drawn, np.uint32(np.flatnonzero(is_open)[-1]))  # a product may round up to the last edge
