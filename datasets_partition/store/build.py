"""Builds the client store of a source, a partition and splits, or reuses the one that was built before."""

import json
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datasets_partition import Partitioners, Sources
from datasets_partition.core.columns import labels
from datasets_partition.core.dealing import listed, together
from datasets_partition.core.types import (
    Assignment,
    DataError,
    Partitioner,
    Rows,
    Source,
    content_columns,
    refuse_misfit,
    refuse_other_rows,
)
from datasets_partition.partitioners.combined import Combined, naturals, parts_of, unit_of
from datasets_partition.sources.files import Files
from datasets_partition.sources.hf_datasets import HfDatasets
from datasets_partition.sources.location import is_local, node_cache, within
from datasets_partition.store import sealed
from datasets_partition.store.contents import (
    CONTENT_LEAK,
    PROMPT_LEAK,
    coded,
    content_numbers,
    first_of_each,
    paired,
    prompt_numbers,
    refuse_leaks,
)
from datasets_partition.store.splits import Held, Splits
from datasets_partition.store.store import INDEX, ROWS_PER_GROUP, STORE_VERSION, write_arrow

OnStep = Callable[[str], None]
ROWS_AT_ONCE = 64 * ROWS_PER_GROUP
STORED = ("client", "category")  # columns that a store has of its own


def build(
    source: Source,
    partitioner: Partitioner,
    splits: Splits,
    seed: int,
    cache: str,
    on_step: OnStep = lambda step: None,
    label: str | None = None,
    beside: tuple[str, ...] | None = (),
    without: tuple[str, ...] = (),
) -> Path:
    """Returns the folder of the store in `cache`, whose name is a hash of everything that its rows depend on.

    It appears whole or not at all, however many builders there are. A remote `cache` gets the store too, and the folder
    is this machine's copy of it. `on_step` is called with the name of each step. `label` names a column to keep as the
    rows' category, in place of the partition's; `beside` names columns to keep beside the content, None all of them.
    Rows of the clients `without` are left out as if nobody had them.
    Raises DataError where an argument cannot be used.
    """
    origin = {
        "source": repr(source),
        "fingerprint": source.fingerprint(),
        "partitioner": repr(partitioner),
        "splits": repr(splits),
        "seed": seed,
        # Where a partition cuts people, version 5 drew parts of them to be unseen.
        "store_version": STORE_VERSION + bool(isinstance(partitioner, Combined) or vars(partitioner).get("max_rows")),
        "own_code": _user_code(source, partitioner),
        "label": label,
        # Since 2 keys of turns and columns beside them are read that were left out before.
        **({"reading": 2} if isinstance(source, Files | HfDatasets) else {}),
        **({"by": splits.by} if splits.by != "row" else {}),
        **({"beside": beside} if beside != () else {}),
        **({"without": without} if without else {}),
    }
    key = sha256(json.dumps(origin).encode()).hexdigest()
    remote = None if is_local(cache) else within(cache, key[:16])
    folder = (node_cache() if remote else Path(cache)) / key[:16]
    sealed.refuse_unwritable(cache)
    if not sealed.ready(folder, key, remote):
        write = _prepare(source, partitioner, splits, seed, on_step, label, beside, without)
        try:
            code_version = version("fedpost")
        except PackageNotFoundError:
            code_version = "not installed: run from its folder"
        with sealed.written_whole(folder) as scratch:
            sealed.seal(scratch, key, {**origin, "fedpost": code_version, **write(scratch)})
        if remote:
            on_step(f"copying the store to {cache}")
    if remote:
        sealed.publish(folder, remote)
    return folder


def _prepare(
    source: Source,
    partitioner: Partitioner,
    splits: Splits,
    seed: int,
    on_step: OnStep,
    label: str | None,
    beside: tuple[str, ...] | None,
    without: tuple[str, ...],
) -> Callable[[Path], dict[str, Any]]:
    """Gives rows to clients; returns the function that writes them into a folder and returns the manifest's counts."""
    loaded, skipped = _load(source, on_step)
    wide = pa.schema([field.with_type(_wide(field.type)) for field in loaded.schema])
    table, columns = loaded.cast(wide).combine_chunks(), content_columns(loaded)
    on_step(f"looking for duplicates among {table.num_rows:,} rows")
    numbers = content_numbers(table, columns)
    if splits.duplicates == "drop":
        # A row and its duplicate could land on both sides of a split: a held-out row would have been trained on.
        firsts = first_of_each(numbers)
        if len(firsts) < table.num_rows:
            table, numbers = table.take(firsts).combine_chunks(), numbers[firsts]

    by_prompt = splits.by == "prompt"
    prompts = prompt_numbers(table) if by_prompt else np.arange(table.num_rows)
    server = splits.server_rows(prompts, rng(seed, "server"))
    owned = np.flatnonzero(~server)
    if not len(owned):
        raise DataError(
            f"data.splits.server is {splits.server}, which leaves clients no row of {table.num_rows}: lower it"
        )
    on_step(f"giving {len(owned):,} rows to clients")
    dealt = table.take(owned) if server.any() else table
    given = partitioner.assign(dealt, rng(seed, "partition"))
    refuse_misfit(given, len(owned), partitioner)
    if by_prompt:
        given = _with_whole_prompts(given, dealt, prompts[owned], partitioner)
    if without:
        absent = pc.is_in(given.names, pa.array(without, pa.string())).to_numpy(zero_copy_only=False)
        given = given._replace(clients=np.where(absent[given.clients], -1, given.clients).astype(np.int32))
    # The clients' rows in the partition's order; nobody's rows are left out.
    by_client = np.lexsort((given.clients,) if given.order is None else (given.order, given.clients))
    by_client = by_client[given.clients[by_client] >= 0]
    clients, rows = given.clients[by_client], owned[by_client]
    people = np.arange(len(given.names))
    if given.people is not None:
        people = given.people.dictionary_encode().indices.to_numpy().astype(np.int64)
    held = splits.assign(clients, people, rng(seed, "splits"), prompts[rows] if by_prompt else None)

    kept, ids, stored = _number(held, clients)
    servers = np.flatnonzero(server)
    order = np.concatenate([rows[stored], servers])
    if splits.leaks == "error":
        trained = np.concatenate([~held.heldout[stored], np.zeros(len(servers), dtype=np.bool_)])
        if splits.duplicates == "keep":
            refuse_leaks(table.take(order), numbers[order], trained, columns, CONTENT_LEAK)
        if by_prompt:
            refuse_leaks(table.select(columns[:1]).take(order), prompts[order], trained, columns[:1], PROMPT_LEAK)
    owners = pa.concat_arrays([given.names.take(clients[stored]), pa.nulls(len(servers), pa.string())])
    category = {}
    if label is not None:
        category = {"category": labels(table, "data.label", label).texts()}
    elif given.category is not None:
        category = {"category": given.category.take(pa.array(np.cumsum(~server) - 1, mask=server))}
    total = np.bincount(ids[clients[stored]], minlength=len(kept))
    heldout = np.bincount(ids[clients[stored]], held.heldout[stored], minlength=len(kept)).astype(np.int64)
    names = given.names.take(kept)
    if len(servers):
        names = pa.concat_arrays([names, pa.nulls(1, pa.string())])
        total, heldout = np.append(total, len(servers)), np.append(heldout, len(servers))
    index = pa.table([names, np.cumsum(total) - total, total - heldout, heldout], names=INDEX.names).cast(INDEX)
    stored_columns = (*columns, *_beside(loaded.column_names, columns, beside))
    content = pa.table(category | {name: table[name] for name in stored_columns})
    stored_as = [pa.field(name, pa.string()) for name in category]
    stored_as += [loaded.schema.field(name) for name in stored_columns]
    schema = pa.schema([("client", pa.string()), *stored_as])
    unit = unit_of(partitioner, int(np.bincount(people).max()), int(np.bincount(clients).max()), loaded.column_names)
    counts = {
        "rows": len(stored),
        "clients": len(kept),
        "unseen_clients": int(held.unseen.sum()),
        "server_rows": len(servers),
        "duplicate_rows": loaded.num_rows - table.num_rows,
        "duplicate_clients": _clients(loaded) - _clients(table),
        "left_out_clients": len(given.names) - len(kept),
        "left_out_rows": len(owned) - len(stored),
        "unassigned_rows": int(np.count_nonzero(given.clients < 0)),
        "skipped_rows": skipped,
        **({"unit": unit} if unit else {}),
        **({"prompts": len(np.unique(prompts[order]))} if by_prompt else {}),
    }

    def write(folder: Path) -> dict[str, Any]:
        options = {"write_statistics": ["client"], "write_page_checksum": True}
        with pq.ParquetWriter(folder / "rows.parquet", schema, **options) as writer:
            for first in range(0, len(order), ROWS_AT_ONCE):
                on_step(f"writing rows {first:,} of {len(order):,}")
                group = content.take(order[first : first + ROWS_AT_ONCE])
                group = group.add_column(0, "client", owners.slice(first, ROWS_AT_ONCE))
                writer.write_table(group.cast(schema), row_group_size=ROWS_PER_GROUP)
        write_arrow(folder / "index.arrow", index)
        return counts

    return write


def _beside(names: list[str], content: tuple[str, ...], beside: tuple[str, ...] | None) -> list[str]:
    """The columns to keep beside the content, without those that a store has anyway."""
    for name in beside or ():
        if name not in names:
            raise DataError(
                f"train.objective reads the column {name!r}, which the source does not give (it gives "
                f"{', '.join(names)}): name another, or rename one in data.source.columns"
            )
    known = {*content, *STORED}
    return [name for name in (names if beside is None else beside) if name not in known]


def _load(source: Source, on_step: OnStep) -> Rows:
    """The source's rows, checked: at least one, in a canonical format."""
    on_step("reading the rows")
    # A user's source takes no listener, not even one that extends ours.
    listener = [lambda rows: on_step(f"reading the rows: {rows:,} so far")] if type(source) in get_args(Sources) else []
    loaded = source.load(*listener)
    refuse_other_rows(loaded, source)
    if not loaded.table.num_rows:
        raise DataError(f"the source gives no rows: {source!r}")
    return loaded


def _with_whole_prompts(
    given: Assignment, table: pa.Table, prompts: NDArray[np.int64], partitioner: Partitioner
) -> Assignment:
    """The assignment of the table's rows with all rows of a prompt at one client, or at one for each natural key."""
    if type(partitioner) not in get_args(Partitioners):
        return given  # whether a user's partition draws is not known
    keys = content_numbers(table, tuple(part.key for part in naturals(partitioner)))
    categories = np.zeros(len(prompts), np.int64) if given.category is None else coded(given.category)[0]
    clients = together(given.clients, paired(keys, prompts), paired(keys, categories))
    clients, names = listed(clients, given.names)
    people = None if given.people is None else given.people.filter(pc.is_in(given.names, names))
    return given._replace(clients=clients, names=names, people=people)


def _number(held: Held, clients: NDArray[np.int32]) -> tuple[NDArray[np.int64], ...]:
    """Kept clients by new id (first those that train), each client's id (-1: none), and rows by id, trained first."""
    kept = np.flatnonzero(held.kept)
    kept = kept[np.argsort(held.unseen[kept], kind="stable")]
    ids = np.full(len(held.kept), -1)
    ids[kept] = np.arange(len(kept))
    stored = np.lexsort((held.heldout, ids[clients]))
    return kept, ids, stored[ids[clients[stored]] >= 0]


def rng(seed: int, purpose: str) -> np.random.Generator:
    """The random numbers of one step of a build."""
    digest = sha256(f"{seed}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _clients(table: pa.Table) -> int:
    """The number of natural clients that still have rows; one whose rows are all duplicates has none."""
    return pc.count_distinct(table["client"]).as_py() if "client" in table.column_names else 0


def _wide(kind: pa.DataType) -> pa.DataType:
    """The type of the same values whose rows can be gathered beyond 2 GiB."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(_wide(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_wide(field.type)) for field in kind])
    return kind


def _user_code(*parts: object) -> str:
    """A hash of the modules of users' sources and partitioners: a change of their code makes another store."""
    paths = {str(sys.modules[type(part).__module__].__file__) for whole in parts for part in parts_of(whole)}
    theirs = sorted(path for path in paths if Path(__file__).parents[1] not in Path(path).parents)
    return sha256(b"\0".join(Path(path).read_bytes() for path in theirs)).hexdigest() if theirs else ""
