"""Token columns: an objective's encoding of each row, computed once and mapped into the memory of every slot."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import count, pairwise, zip_longest
from mmap import ACCESS_READ, MADV_DONTNEED, MADV_WILLNEED, PAGESIZE, mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.types import OnRows, ignore
from datasets_partition.sources.location import within
from datasets_partition.store import sealed
from datasets_partition.store.store import SplitName, Store, column, write_arrow

ROWS_PER_BATCH = 4096  # encoded at once; clients whose first rows lie in one window of this size share a record batch
READS_MAPPED = 16  # reads of clients' rows after which pages are released: each may keep a third of a megabyte mapped
BATCHES_KNOWN = 256  # a few kilobytes each
TOKENS_AT_ONCE = 32_768  # up to here the system reads all with the first page, faster than advice would be

IDS = "_ids"  # ends the names of columns that hold token ids

# A row for each client: its batch and place there, its rows and dropped rows by split, and its training tokens.
COUNTS = ("batch", "start", "train", "heldout", "dropped_train", "dropped_heldout")
INDEX = pa.schema([("name", pa.string()), *((name, pa.int32()) for name in COUNTS), ("tokens", pa.int64())])

Encode = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Tokens:
    """The token columns of one store for one objective and tokenizer, mapped and never copied."""

    folder: Path
    index: pa.Table
    batches: pa.RecordBatchFileReader
    pages: tuple[mmap, ...]
    reads: Iterator[int] = field(default_factory=count)
    known: dict[int, pa.RecordBatch] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Tokens":
        """Opens the token columns that `tokenize` left in `folder`. Raises DataError if they are damaged."""
        with sealed.readable(folder):
            pages = []
            for name in ("index.arrow", "tokens.arrow"):
                with (folder / name).open("rb") as file:
                    pages.append(mmap(file.fileno(), 0, access=ACCESS_READ))
            index, batches = (pa.ipc.open_file(pa.BufferReader(pa.py_buffer(file))) for file in pages)
            return cls(folder, index.read_all(), batches, tuple(pages))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path alone."""
        return Tokens.open, (self.folder,)

    def rows(self, client: int, split: SplitName) -> pa.RecordBatch:
        """The rows of one client in `split`, in the source's order: a view of the mapped file, valid for good."""
        assert 0 <= client < self.index.num_rows
        if next(self.reads) % READS_MAPPED == 0:
            for file in self.pages:
                file.madvise(MADV_DONTNEED)
        first = int(self._columns["start"][client])
        if split == "heldout":
            first += int(self._columns["train"][client])
        return self._batch(int(self._columns["batch"][client])).slice(first, int(self._columns[split][client]))

    def in_advance(self, units: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Yields the units of clients in order; while a unit is worked on, the system reads the next unit's rows."""
        for unit, following in zip_longest(units, units[1:], fillvalue=()):
            for client in following:
                if self.lengths()[client] > TOKENS_AT_ONCE:
                    self._will_need(client)
            yield unit

    def _will_need(self, client: int) -> None:
        """Lets the system read the pages of a client's training rows, without waiting for them."""
        _, file = self.pages
        begin = pa.py_buffer(file).address
        for values in self.rows(client, "train").columns:
            flat = values.flatten() if pa.types.is_list(values.type) else values
            if len(flat):
                first = flat.buffers()[1].address - begin + flat.offset * flat.type.bit_width // 8
                start = first - first % PAGESIZE
                file.madvise(MADV_WILLNEED, start, first + len(flat) * flat.type.bit_width // 8 - start)

    def _batch(self, number: int) -> pa.RecordBatch:
        """A record batch of the file; looking it up takes longer than reading a client's rows in it."""
        if number not in self.known:
            if len(self.known) == BATCHES_KNOWN:
                self.known.clear()
            with sealed.readable(self.folder):
                batch = self.batches.get_batch(number)
                batch.validate(full=True)  # Arrow does not check what it reads
                self.known[number] = batch
        return self.known[number]

    @cached_property
    def _columns(self) -> dict[str, NDArray[Any]]:
        """The index's number columns, as views."""
        return {name: column(self.index, name) for name in self.index.column_names if name != "name"}

    def counts(self, split: SplitName) -> NDArray[np.int32]:
        """Rows of each client in `split`, by id, without dropped ones."""
        return self._columns[split]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each client's training rows together, by id."""
        return self._columns["tokens"]

    def dropped(self, split: SplitName) -> NDArray[np.int32]:
        """Rows of each client in `split`, by id, that the objective dropped."""
        return self._columns[f"dropped_{split}"]

    def empty_clients(self) -> list[str]:
        """Names of the training clients whose training rows were all dropped."""
        empty = (self.counts("train") == 0) & (self.dropped("train") > 0)
        return list(self.index["name"].filter(pa.array(empty)).to_pylist())


def tokenize(
    store: Store,
    key: str,
    encode: Encode,
    shared: str | None = None,
    on_rows: OnRows = ignore,
    regroup: Encode | None = None,
) -> Tokens:
    """Returns the token columns of all rows of `store`, encoded now or reused from an earlier call with this `key`.

    `encode` gives a row for each canonical row, always in the same columns, among them `input_ids`, a list, null where
    a row is to be dropped; columns whose names end in `_ids` hold tokens. `regroup` makes other rows of all encoded
    rows of a client's split. `key` names everything that the result depends on. `shared` is the remote location, if
    any, that the store was copied from: the columns are copied there too. Raises DataError if earlier columns are
    damaged.
    """
    digest = sha256(key.encode()).hexdigest()
    name = f"tokens-{digest[:16]}"
    folder, remote = store.folder / name, within(shared, name) if shared else None
    if not sealed.ready(folder, digest, remote):
        with sealed.written_whole(folder) as scratch:
            _write(store, encode, scratch, on_rows, regroup)
            sealed.seal(scratch, digest, {})
    if remote:
        sealed.publish(folder, remote)
    return Tokens.open(folder)


def _write(store: Store, encode: Encode, folder: Path, on_rows: OnRows, regroup: Encode | None) -> None:
    train, heldout = store.counts("train").astype(np.int64), store.counts("heldout").astype(np.int64)
    batch = np.unique(store.starts // ROWS_PER_BATCH, return_inverse=True)[1]
    edges = np.flatnonzero(np.diff(batch, prepend=-1, append=batch[-1] + 1))
    start, kept_train, kept_heldout, tokens, dropped_train, dropped_heldout = (np.zeros_like(train) for _ in range(6))
    writer: pa.RecordBatchFileWriter | None = None
    with ExitStack() as closing:
        for first, last in pairwise(edges):
            members = slice(first, last)
            begin = store.starts[members] - store.starts[first]
            rows = store.read_span(int(store.starts[first]), int((train + heldout)[members].sum()))
            encoded = pa.concat_tables(_encoded(rows, encode))
            # kept[i]: the number of rows among the first i that stay.
            stays = encoded["input_ids"].is_valid()
            kept = np.concatenate([[0], np.cumsum(stays.to_numpy())])
            middle = begin + train[members]
            start[members] = kept[begin]
            kept_train[members] = kept[middle] - kept[begin]
            kept_heldout[members] = kept[middle + heldout[members]] - kept[middle]
            dropped_train[members] = train[members] - kept_train[members]
            dropped_heldout[members] = heldout[members] - kept_heldout[members]
            encoded = encoded.filter(stays)
            if regroup is not None:
                parts, placed = list[pa.Table](), 0
                for client in range(first, last):
                    split, place = (kept_train[client], kept_heldout[client]), start[client]
                    mine = [regroup(encoded.slice(place, split[0])), regroup(encoded.slice(place + split[0], split[1]))]
                    kept_train[client], kept_heldout[client] = (part.num_rows for part in mine)
                    start[client] = placed
                    placed += kept_train[client] + kept_heldout[client]
                    parts += mine
                encoded = pa.concat_tables(parts)
            ends = np.concatenate([[0], np.cumsum(row_lengths(encoded), dtype=np.int64)])
            tokens[members] = ends[start[members] + kept_train[members]] - ends[start[members]]
            writer = writer or closing.enter_context(pa.ipc.new_file(folder / "tokens.arrow", encoded.schema))
            columns = [chunks.combine_chunks() for chunks in encoded.columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=encoded.schema))
            on_rows(int(store.starts[first]) + rows.num_rows)
    counts = [batch, start, kept_train, kept_heldout, dropped_train, dropped_heldout]
    columns = [store.index["name"], *(pa.array(values.astype(np.int32)) for values in counts), pa.array(tokens)]
    write_arrow(folder / "index.arrow", pa.table(columns, schema=INDEX))


def row_lengths(encoded: pa.Table) -> NDArray[np.int32]:
    """Returns the number of each encoded row's tokens, in all its columns of tokens."""
    columns = [encoded[name] for name in encoded.column_names if name.endswith(IDS)]
    total: NDArray[np.int32] = np.sum([pc.list_value_length(column).to_numpy() for column in columns], axis=0)
    return total


def _encoded(rows: pa.Table, encode: Encode) -> Iterator[pa.Table]:
    for first in range(0, rows.num_rows, ROWS_PER_BATCH):
        some = rows.slice(first, ROWS_PER_BATCH)
        encoded = encode(some)
        if encoded.num_rows != some.num_rows or "input_ids" not in encoded.column_names:
            raise ValueError(
                f"the objective made {encoded.num_rows} rows of {', '.join(encoded.column_names)} from {some.num_rows} "
                f"rows: its encode must give a row for each, with input_ids, null where the row is dropped"
            )
        yield encoded
