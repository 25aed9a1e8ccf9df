"""The same partitions by flwr-datasets, timed beside ours on the same rows, once both have been found to agree."""

import os
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.types import Partitioner
from datasets_partition.partitioners.dirichlet import Dirichlet
from datasets_partition.partitioners.natural import Natural
from datasets_partition.store.build import rng

ROWS_PER_CLIENT, LABELS, CLIENTS, ALPHA = 100, 10, 100, 0.5
OUR_TRIES, THEIR_TRIES = 5, 3
# Of the two-sample Kolmogorov-Smirnov test: samples of one law are further apart once in a million times.
FAR = 2.69


class Times(NamedTuple):
    """Median seconds of processor time to know the rows of every client: a busy machine favours neither library."""

    ours: float
    theirs: float


def is_there() -> bool:
    """Whether flwr-datasets is installed."""
    return find_spec("flwr_datasets") is not None


def compare(kind: str, rows: int) -> Times:
    """Times of the natural or the Dirichlet partition of `rows` rows; ValueError when the two do not agree."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "TQDM_DISABLE": "1"}  # read when they are imported
    table = labelled(rows)
    dataset = import_module("datasets").Dataset.from_dict(table.to_pydict())
    flwr = import_module("flwr_datasets.partitioner")

    if kind == "natural":
        found, ours = _ours(Natural(), table)
        made, theirs = _theirs(lambda seed: flwr.NaturalIdPartitioner("client"), dataset)
        refuse_other_rows(_rows_of_each(found[0]), _their_rows(made[0]))
    else:
        found, ours = _ours(Dirichlet(label="label", clients=CLIENTS, alpha=ALPHA), table)
        made, theirs = _theirs(
            lambda seed: flwr.DirichletPartitioner(CLIENTS, "label", ALPHA, min_partition_size=1, seed=seed), dataset
        )
        labels = table["label"].to_numpy().astype(np.int64)
        refuse_another_law(
            [_counts(_rows_of_each(owners), labels) for owners in found],
            [_counts(_their_rows(partitioner), labels) for partitioner in made],
        )
    return Times(ours, theirs)


def labelled(rows: int) -> pa.Table:
    """Rows with their number, one of `rows / 100` clients, and one of ten labels, all at random."""
    random = np.random.default_rng(5)
    return pa.table(
        {
            "row": np.arange(rows),
            "client": pa.array(random.integers(0, rows // ROWS_PER_CLIENT, rows)).cast(pa.string()),
            "label": pa.array(random.integers(0, LABELS, rows)).cast(pa.string()),
        }
    )


def refuse_other_rows(ours: list[NDArray[np.int64]], theirs: list[NDArray[np.int64]]) -> None:
    """Raises ValueError unless each client has the same rows in both."""
    if len(ours) != len(theirs) or not all(map(np.array_equal, ours, theirs)):
        raise ValueError("the natural partition differs from the one of flwr-datasets: its time says nothing")


def refuse_another_law(ours: list[NDArray[np.int64]], theirs: list[NDArray[np.int64]]) -> None:
    """Raises ValueError unless the clients' shares of the labels (each draw: clients x labels rows) are of one law.

    What is compared are the distributions of all shares and of the clients' sizes, over all draws.
    """
    both = np.stack(ours), np.stack(theirs)
    shares = [np.sort((counts / counts.sum(axis=1, keepdims=True)).ravel()) for counts in both]
    sizes = [np.sort(counts.sum(axis=2).ravel()) for counts in both]
    for one, other in (shares, sizes):
        values = np.concatenate([one, other])
        below = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (one, other)]
        if np.abs(below[0] - below[1]).max() > FAR * np.sqrt(1 / len(one) + 1 / len(other)):
            raise ValueError("the Dirichlet partition is of another law than that of flwr-datasets")


def _ours(partitioner: Partitioner, table: pa.Table) -> tuple[list[NDArray[np.int32]], float]:
    """The owners of the rows by several seeds, and the median time."""
    seeds = [rng(seed, "bench") for seed in range(OUR_TRIES)]
    times, found = zip(*(_timed(partitioner.assign, table, seed) for seed in seeds), strict=True)
    return [assignment.clients for assignment in found], statistics.median(times)


def _theirs(make: Callable[[int], Any], dataset: Any) -> tuple[list[Any], float]:
    """Their partitioners by several seeds, and the median time: the first client asked for has all of them made."""
    made = [make(seed) for seed in range(THEIR_TRIES)]
    for partitioner in made:
        partitioner.dataset = dataset
    return made, statistics.median(_timed(partitioner.load_partition, 0)[0] for partitioner in made)


def _rows_of_each(owners: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    if owners.min() < 0:
        raise ValueError("our partition leaves rows without a client")
    return np.split(np.argsort(owners, kind="stable"), np.cumsum(np.bincount(owners))[:-1])


def _their_rows(partitioner: Any) -> list[NDArray[np.int64]]:
    """The rows of each of their clients, ascending."""
    parts = (partitioner.load_partition(client) for client in range(partitioner.num_partitions))
    return [np.sort(np.array(part["row"][:])) for part in parts]


def _counts(rows_of_each: list[NDArray[np.int64]], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each client, a row, by label, a column. Raises ValueError unless every row has one client."""
    if not np.array_equal(np.sort(np.concatenate(rows_of_each)), np.arange(len(labels))):
        raise ValueError("a Dirichlet partition does not give each row to one client: its time says nothing")
    return np.stack([np.bincount(labels[rows], minlength=LABELS) for rows in rows_of_each])


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    began = time.process_time()
    result = work(*arguments)
    return time.process_time() - began, result
