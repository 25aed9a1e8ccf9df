"""The client store: rows sorted by client in one Parquet file, and an index of the clients.

rows.parquet     client, content, category if any; a client's training rows, then its held-out rows; last the server's
index.arrow      a row for each client: name, start, train, heldout; unseen clients last, then the nameless server
manifest.json    what the store was made from, and the numbers of its rows and clients
tokens-*/        token columns of these rows, see tokens.py
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datasets_partition.store.sealed import MANIFEST, readable

SplitName = Literal["train", "heldout"]

# Part of a store's key: raise it when the layout of a store or of its token columns changes, or the drawing of rows.
STORE_VERSION = 5
ROWS_PER_GROUP = 1024  # the smallest unit that Parquet reads: about the rows of one client
INDEX = pa.schema([("name", pa.string()), ("start", pa.int64()), ("train", pa.int32()), ("heldout", pa.int32())])


@dataclass(frozen=True)
class Store:
    """A store, opened for reading; clients 0 to `num_training - 1` train, those up to `num_clients - 1` never do."""

    folder: Path
    index: pa.Table
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Opens the store that `build` left in `folder`. Raises DataError if it is damaged."""
        with readable(folder):
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            index = pa.ipc.open_file(pa.memory_map(str(folder / "index.arrow"))).read_all()
            return cls(folder, index, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path alone."""
        return Store.open, (self.folder,)

    @property
    def num_clients(self) -> int:
        """The number of clients, unseen ones included."""
        return int(self.manifest["clients"])

    @property
    def num_training(self) -> int:
        """The number of clients that may be sampled; all rows of the others are `heldout`."""
        return self.num_clients - int(self.manifest["unseen_clients"])

    @property
    def server(self) -> int | None:
        """The id of the server's rows, if it has any; they are all `heldout`."""
        return self.num_clients if self.index.num_rows > self.num_clients else None

    def name(self, client: int) -> str:
        """The name of one client."""
        return self.names([client])[0]

    def names(self, clients: list[int]) -> list[str]:
        """The names of some clients."""
        return list(self.index["name"].take(pa.array(clients, pa.int64())).to_pylist())

    def counts(self, split: SplitName) -> NDArray[np.int32]:
        """Rows of each client in `split`, by id: a view of the mapped index."""
        return column(self.index, split)

    def read_rows(self, client: int, split: SplitName) -> pa.Table:
        """The rows of one client in `split`, in the partition's order; reads the row groups that hold them."""
        assert 0 <= client < self.index.num_rows
        first = int(self.starts[client]) + (int(self.counts("train")[client]) if split == "heldout" else 0)
        return self.read_span(first, int(self.counts(split)[client]))

    @property
    def starts(self) -> NDArray[np.int64]:
        """The position in the file of each client's first row, by id: a view of the mapped index."""
        return column(self.index, "start")

    def read_span(self, first: int, count: int) -> pa.Table:
        """`count` rows of the file from its row `first` on. Raises DataError if the file is damaged."""
        with readable(self.folder):
            if not count:
                return self._rows.schema_arrow.empty_table()
            groups = range(first // ROWS_PER_GROUP, (first + count - 1) // ROWS_PER_GROUP + 1)
            return self._rows.read_row_groups(groups).slice(first - groups[0] * ROWS_PER_GROUP, count)

    @cached_property
    def _rows(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.folder / "rows.parquet", memory_map=True, page_checksum_verification=True)


def write_arrow(path: Path, table: pa.Table) -> None:
    """Writes a table as an Arrow file of one batch, so that `column` is a view."""
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def column(index: pa.Table, name: str) -> NDArray[Any]:
    """One number column of an index as an array, without a copy."""
    values: NDArray[Any] = index[name].chunk(0).to_numpy(zero_copy_only=True)
    return values
