"""The same partitions by flwr-datasets, timed beside ours on the same rows after both are seen to agree."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datasets_partition.core.types import Partitioner
from datasets_partition.partitioners.dirichlet import Dirichlet
from datasets_partition.partitioners.natural import Natural
from datasets_partition.store.build import rng
from experiments.bench.harness import seconds_of

ROWS_PER_CLIENT, LABELS, CLIENTS, ALPHA = 100, 10, 100, 0.5
OUR_TRIES, THEIR_TRIES = 5, 3
# Of the two-sample Kolmogorov-Smirnov test: samples of one law are further apart once in a million times.
FAR = 2.69


def is_there() -> bool:
    """Whether flwr-datasets is installed."""
    return find_spec("flwr_datasets") is not None


def compare(kind: str, rows: int) -> tuple[float, float]:
    """Our and their seconds for the natural or the Dirichlet partition of `rows` rows; ValueError if they disagree.

    The median of processor time until the rows of every client are known: a busy machine favors neither library.
    """
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "TQDM_DISABLE": "1"}  # read at import
    table = labelled(rows)
    dataset = import_module("datasets").Dataset.from_dict(table.to_pydict())
    flwr = import_module("flwr_datasets.partitioner")

    if kind == "natural":
        our_clients, ours = _ours(Natural(), table)
        partitioners, theirs = _theirs(lambda seed: flwr.NaturalIdPartitioner("client"), dataset)
        refuse_other_rows(_rows_of_each(our_clients[0]), _their_rows(partitioners[0]))
    else:
        our_clients, ours = _ours(Dirichlet(label="label", clients=CLIENTS, alpha=ALPHA), table)
        partitioners, theirs = _theirs(
            lambda seed: flwr.DirichletPartitioner(CLIENTS, "label", ALPHA, min_partition_size=1, seed=seed), dataset
        )
        labels = table["label"].to_numpy().astype(np.int64)
        refuse_another_law(
            [_counts(_rows_of_each(clients), labels) for clients in our_clients],
            [_counts(_their_rows(partitioner), labels) for partitioner in partitioners],
        )
    return ours, theirs


def labelled(rows: int) -> pa.Table:
    """Rows with their number, one of `rows / 100` clients, and one of ten labels, all at random."""
    random = np.random.default_rng(5)
    clients, labels = (random.integers(0, most, rows) for most in (rows // ROWS_PER_CLIENT, LABELS))
    texts = {"client": pa.array(clients).cast(pa.string()), "label": pa.array(labels).cast(pa.string())}
    return pa.table({"row": np.arange(rows), **texts})


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
    for ours_sorted, theirs_sorted in (shares, sizes):
        values = np.concatenate([ours_sorted, theirs_sorted])
        ours_below, theirs_below = (
            np.searchsorted(sample, values, side="right") / len(sample) for sample in (ours_sorted, theirs_sorted)
        )
        far = FAR * np.sqrt(1 / len(ours_sorted) + 1 / len(theirs_sorted))
        if np.abs(ours_below - theirs_below).max() > far:
            raise ValueError("the Dirichlet partition is of another law than that of flwr-datasets")


def _timed(work: Sequence[Callable[[], Any]]) -> tuple[list[Any], float]:
    """What each of some calls returns, and the median of their processor time in seconds."""
    timed = [seconds_of(call, clock=time.process_time) for call in work]
    return [result for _, result in timed], statistics.median(seconds for (seconds,), _ in timed)


def _ours(partitioner: Partitioner, table: pa.Table) -> tuple[list[NDArray[np.int32]], float]:
    """The clients of the rows by several seeds, and the median time."""
    draws = (rng(seed, "bench") for seed in range(OUR_TRIES))
    assigned, seconds = _timed([partial(partitioner.assign, table, draw) for draw in draws])
    return [each.clients for each in assigned], seconds


def _theirs(make: Callable[[int], Any], dataset: Any) -> tuple[list[Any], float]:
    """Their partitioners by several seeds, and the median time: the first client asked for has all of them made."""
    partitioners = [make(seed) for seed in range(THEIR_TRIES)]
    for partitioner in partitioners:
        partitioner.dataset = dataset
    return partitioners, _timed([partial(each.load_partition, 0) for each in partitioners])[1]


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
