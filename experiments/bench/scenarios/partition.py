"""`fedpost bench partition`: stores of up to a million clients, and partitions against those of flwr-datasets.

No figure is printed unless each store gives back the rows that were put in, and both libraries' partitions of the same
rows agree. It builds about 3 GB in full size, in the folder for temporary files, and deletes them at the end.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datasets_partition.partitioners.by_label import Dirichlet
from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.files import ParquetFiles
from datasets_partition.store.build import build, rng
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens, tokenize
from experiments.bench.harness import Bench, Figure, power, seconds_of
from experiments.preflight.processes import environment, in_fresh_process, memory
from strategies.core.cohort import UniformCohort

ROWS, WORDS, SEED = 10, 8, 1  # rows of a client, words of a row
CHECKED, TRIES, ROUNDS = 20, 21, 5
ROWS_PER_CLIENT, LABELS, CLIENTS, ALPHA = 100, 10, 100, 0.5
OUR_TRIES, THEIR_TRIES = 5, 3
FAR = 2.69  # of the two-sample Kolmogorov-Smirnov test: samples of one law are further apart once in a million times


class Size(NamedTuple):
    """How large a run is."""

    populations: tuple[int, ...]  # ascending powers of ten
    cohort: int
    compared: tuple[int, ...]  # rows of the partitions
    slots: int  # fresh processes that read each of the smallest and the largest population


FULL = Size((10**3, 10**5, 10**6), cohort=10_000, compared=(10**5, 10**6), slots=3)
SMALL = Size((10**2, 10**4), cohort=100, compared=(10**4,), slots=1)


def partition(bench: Bench) -> None:
    """Measures stores and partitions; ValueError when a store lacks rows, or a partition is not what it should be."""
    size = SMALL if bench.small else FULL
    smallest, *_, largest = size.populations
    slots: dict[int, dict[str, float]] = {}
    for population in size.populations:
        with TemporaryDirectory(dir=bench.folder) as name:
            source = Path(name) / "rows.parquet"
            bench.say(f"{population:,} clients: making {population * ROWS:,} rows")
            write_rows(source, population)
            bench.say(f"{population:,} clients: building the store")
            folder, figures = in_fresh_process(_build, source, Path(name) / "stores", population, bench)
            bench.figures |= figures  # the largest population's stay
            bench.say(f"{population:,} clients: making token columns, reading rows back")
            tokens = tokenize(Store.open(folder), "bytes", to_bytes)
            refuse_another_store(source, population, Store.open(folder), tokens)
            _measure_reading(bench, folder, tokens.folder, population, size.cohort)
            if population in (smallest, largest):
                bench.say(f"{population:,} clients: reading as a slot does")
                read = _read_as_slot, folder, tokens.folder, smallest // 2
                held = [in_fresh_process(*read) for _ in range(size.slots)]
                slots[population] = {kind: statistics.median(each[kind] for each in held) for kind in held[0]}
    for figure, kind in (("slot_rss_growth_mb", "VmRSS"), ("slot_private_growth_mb", "RssAnon")):
        known = kind in slots[smallest]  # on some systems it is not
        bench.add(figure, slots[largest][kind] - slots[smallest][kind] if known else None, "MB")
    compare_with_flwr(bench, size.compared)


def write_rows(path: Path, population: int) -> None:
    """Parquet of `ROWS` rows of random words for each client, in random order."""
    random = np.random.default_rng(SEED)
    letters = random.integers(ord("a"), ord("z") + 1, (4096, 8), np.uint8)
    words = pa.array([row[: 2 + i % 7].tobytes().decode() for i, row in enumerate(letters)])
    owners = random.permutation(np.repeat(np.arange(population), ROWS))
    schema = pa.schema([("client", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for some in np.split(owners, range(1 << 17, len(owners), 1 << 17)):
            drawn = words.take(pa.array(random.integers(0, len(words), len(some) * WORDS)))
            ends = np.arange(0, len(drawn) + 1, WORDS, dtype=np.int32)
            texts = pc.binary_join(pa.ListArray.from_arrays(ends, drawn), " ")
            writer.write_table(pa.table([pa.array(some).cast(pa.string()), texts], schema=schema))


def to_bytes(rows: pa.Table) -> pa.Table:
    """The bytes of the completion, in place of an objective's `encode`, since tokenizing is not measured."""
    texts = rows["completion"].combine_chunks().cast(pa.large_binary())
    ends = np.append(0, np.cumsum(pc.binary_length(texts).to_numpy())).astype(np.int32)
    content = np.frombuffer(b"".join(texts.to_pylist()), np.uint8).astype(np.int32)
    return pa.table({"input_ids": pa.ListArray.from_arrays(ends, content)})


def refuse_another_store(source: Path, population: int, store: Store, tokens: Tokens) -> None:
    """Raises ValueError unless all rows are there, and those of some clients are the ones of `source`."""
    all_rows = store.counts("train").astype(np.int64) + store.counts("heldout")
    complete = len(all_rows) == population and (all_rows == ROWS).all()
    chosen = np.random.default_rng(SEED).choice(store.num_clients, CHECKED, replace=False).tolist()
    names = [store.name(client) for client in chosen]
    given = pq.read_table(source, filters=pc.field("client").isin(names)).group_by("client")
    texts = {row["client"]: sorted(row["text_list"]) for row in given.aggregate([("text", "list")]).to_pylist()}
    for client, name in zip(chosen, names, strict=True):
        rows = pa.concat_tables([store.read_rows(client, "train"), store.read_rows(client, "heldout")])
        ids = pa.concat_batches([tokens.rows(client, "train"), tokens.rows(client, "heldout")])["input_ids"]
        complete &= sorted(rows["completion"].to_pylist()) == texts[name]
        complete &= sorted(bytes(row).decode() for row in ids.to_pylist()) == texts[name]
    if not complete:
        raise ValueError(f"the store of {population:,} clients does not hold the rows that were put in")


def _measure_reading(bench: Bench, folder: Path, tokens: Path, population: int, cohort: int) -> None:
    """Milliseconds to open a store with its token columns, and to draw a cohort and look up its clients' rows."""
    store, columns = Store.open(folder), Tokens.open(tokens)
    opening, _ = seconds_of(lambda: (Store.open(folder).num_training, Tokens.open(tokens)), TRIES)
    bench.add(f"open_ms_{power(population)}", statistics.median(opening) * 1e3, "ms")
    if store.num_training < cohort:
        return
    kind, rounds = UniformCohort(size=cohort), count()
    drawn = kind.sample(store.num_training, SEED, 0)
    if len(np.unique(drawn)) != cohort or drawn.min() < 0 or drawn.max() >= store.num_training:
        raise ValueError(f"a cohort of {cohort:,} is not one of different training clients")
    drawing, _ = seconds_of(lambda: columns.counts("train")[kind.sample(store.num_training, SEED, next(rounds))], TRIES)
    bench.add(f"cohort_ms_{power(population)}", statistics.median(drawing) * 1e3, "ms")


def _read_as_slot(folder: Path, tokens: Path, cohort: int) -> dict[str, float]:
    """The memory of this process after some rounds: what a slot maps and copies of its clients' rows."""
    store, columns = Store.open(folder), Tokens.open(tokens)
    columns.counts("train").max()
    for round_ in range(ROUNDS):
        for client in UniformCohort(size=cohort).sample(store.num_training, SEED, round_).tolist():
            rows = columns.rows(client, "train")
            rows.take(pa.array(np.arange(rows.num_rows)))
    return memory()


def _build(source: Path, cache: Path, population: int, bench: Bench) -> tuple[Path, dict[str, Figure]]:
    """A store, and the wall and processor time of its build, and the most memory of this process, which built it."""
    began, cpu, say = time.perf_counter(), time.process_time(), partial(bench.say, pause_s=2.0)
    folder = build(ParquetFiles(path=str(source)), Natural(), Splits(), SEED, str(cache), say)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return folder, {
        "build_rows_per_s": Figure(population * ROWS / seconds, "rows/s"),
        "build_s": Figure(seconds, "s"),
        "build_cpu_s": Figure(cpu_s, "s"),
        "build_peak_mb": Figure(memory().get("VmHWM"), "MB"),
    }


def compare_with_flwr(bench: Bench, compared: tuple[int, ...]) -> None:
    """Adds times of both libraries and their ratio; the ratio without a size is the smallest."""
    if not (has_it := has_flwr()):
        bench.say("flwr-datasets is not installed: no speedups")
    for kind in ("natural", "dirichlet"):
        ratios = []
        for rows in compared if has_it else ():
            bench.say(f"the {kind} partition of {rows:,} rows, by both libraries")
            with environment(FLWR_TELEMETRY_ENABLED="0", TQDM_DISABLE="1"):  # read when the process imports tqdm
                ours, theirs = in_fresh_process(time_both, kind, rows)
            ratios.append(theirs / ours)
            bench.add(f"{kind}_ms_{power(rows)}", ours * 1e3, "ms")
            bench.add(f"flwr_{kind}_ms_{power(rows)}", theirs * 1e3, "ms")
            bench.add(f"speedup_{kind}_{power(rows)}", ratios[-1], "times")
        bench.add(f"speedup_{kind}", min(ratios, default=None), "times")


def has_flwr() -> bool:
    """Whether flwr-datasets is installed."""
    return find_spec("flwr_datasets") is not None


def time_both(kind: str, rows: int) -> tuple[float, float]:
    """Our and their median seconds until the rows of every client are known; ValueError if the partitions disagree."""
    table, flwr = labeled(rows), import_module("flwr_datasets.partitioner")
    dataset = import_module("datasets").Dataset.from_dict(table.to_pydict())
    natural = kind == "natural"
    partitioner = Natural() if natural else Dirichlet(label="label", clients=CLIENTS, alpha=ALPHA)
    make = partial(flwr.DirichletPartitioner, CLIENTS, "label", ALPHA, min_partition_size=1)
    partitioners = [flwr.NaturalIdPartitioner("client") if natural else make(seed=seed) for seed in range(THEIR_TRIES)]
    for each in partitioners:
        each.dataset = dataset
    calls = [partial(partitioner.assign, table, rng(seed, "bench")) for seed in range(OUR_TRIES)]
    assigned, our_s = _timed(calls)
    _, their_s = _timed([partial(each.load_partition, 0) for each in partitioners])  # it makes all clients
    ours, theirs = (_rows_of_each(each.clients) for each in assigned), map(_their_rows, partitioners)
    if natural:
        refuse_other_rows(next(ours), next(theirs))
    else:
        labels = table["label"].to_numpy().astype(np.int64)
        refuse_another_law(*([_counts(rows, labels) for rows in draws] for draws in (ours, theirs)))
    return our_s, their_s


def labeled(rows: int) -> pa.Table:
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
    """Raises ValueError unless the shares of labels and the sizes of clients (clients x labels rows) are of one law."""
    both = np.stack(ours), np.stack(theirs)
    shares = [np.sort((counts / counts.sum(axis=1, keepdims=True)).ravel()) for counts in both]
    sizes = [np.sort(counts.sum(axis=2).ravel()) for counts in both]
    for samples in (shares, sizes):
        values = np.concatenate(samples)
        below = [np.searchsorted(sample, values, side="right") / len(sample) for sample in samples]
        if np.abs(below[0] - below[1]).max() > FAR * np.sqrt(sum(1 / len(sample) for sample in samples)):
            raise ValueError("the Dirichlet partition is of another law than that of flwr-datasets")


def _timed(work: Sequence[Callable[[], Any]]) -> tuple[list[Any], float]:
    """What some calls return, and the median of their processor seconds: a busy machine favors neither library."""
    timed = [seconds_of(call, clock=time.process_time) for call in work]
    return [result for _, result in timed], statistics.median(seconds for (seconds,), _ in timed)


def _rows_of_each(owners: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    if owners.min() < 0:
        raise ValueError("our partition leaves rows without a client")
    return np.split(np.argsort(owners, kind="stable"), np.cumsum(np.bincount(owners))[:-1])


def _their_rows(partitioner: Any) -> list[NDArray[np.int64]]:
    """The rows of each of their clients, ascending."""
    clients = (partitioner.load_partition(client) for client in range(partitioner.num_partitions))
    return [np.sort(np.array(client["row"][:])) for client in clients]


def _counts(rows_of_each: list[NDArray[np.int64]], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each client, a row, by label, a column. Raises ValueError unless every row has one client."""
    if not np.array_equal(np.sort(np.concatenate(rows_of_each)), np.arange(len(labels))):
        raise ValueError("a Dirichlet partition does not give each row to one client: its time says nothing")
    return np.stack([np.bincount(labels[rows], minlength=LABELS) for rows in rows_of_each])
