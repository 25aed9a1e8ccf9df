import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.store.sealed import written_whole
from datasets_partition.store.stats import Skew
from datasets_partition.store.store import INDEX, ROWS_PER_GROUP, Store, write_arrow


def stored(folder: Path, train: list[int], heldout: list[int]) -> Store:
    """A store written by hand: a row's prompt is its position in the file."""
    total = np.add(train, heldout)
    names = [f"c{client}" for client in range(len(train))]
    rows = pa.table(
        {
            "client": np.repeat(names, total).tolist(),
            "prompt": [str(row) for row in range(total.sum())],
            "completion": ["x"] * int(total.sum()),
        }
    )
    index = pa.table(
        {
            "name": names,
            "start": (np.cumsum(total) - total).astype(np.int64),
            "train": np.array(train, np.int32),
            "heldout": np.array(heldout, np.int32),
        },
        schema=INDEX,
    )
    folder.mkdir()
    pq.write_table(rows, folder / "rows.parquet", row_group_size=ROWS_PER_GROUP)
    write_arrow(folder / "index.arrow", index)
    manifest = {"clients": len(train), "unseen_clients": train.count(0)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Store.open(folder)


def test_clients_and_their_rows(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [2, 1, 0], [1, 0, 3])
    assert (store.num_clients, store.num_training, store.server) == (3, 2, None)
    assert [store.name(client) for client in range(3)] == ["c0", "c1", "c2"]
    assert store.read_rows(0, "train")["prompt"].to_pylist() == ["0", "1"]
    assert store.read_rows(0, "heldout")["prompt"].to_pylist() == ["2"]
    assert store.read_rows(1, "train")["prompt"].to_pylist() == ["3"]
    assert store.read_rows(2, "heldout").to_pylist()[2] == {"client": "c2", "prompt": "6", "completion": "x"}


def test_files_that_cannot_be_read_name_the_store(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [2, 1, 0], [1, 0, 3])
    spoilt = r"^.*/store is damaged \(.+\): move or delete it; then it is made again$"
    (store.folder / "rows.parquet").write_bytes(bytes((store.folder / "rows.parquet").stat().st_size))
    for read in (lambda: store.read_rows(0, "train"), lambda: Skew.of(store)):
        with pytest.raises(DataError, match=spoilt):
            read()
    for name in ("index.arrow", "manifest.json"):
        (store.folder / name).write_bytes(b"x")
        with pytest.raises(DataError, match=spoilt):
            Store.open(store.folder)


def test_opening_reads_no_index(tmp_path: Path) -> None:
    stored(tmp_path / "store", [1] * 100_000, [0] * 100_000)
    before = pa.total_allocated_bytes()
    store = Store.open(tmp_path / "store")
    assert store.counts("train").sum() == 100_000
    assert pa.total_allocated_bytes() - before < 10_000


def test_no_rows_are_a_table_without_rows(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [2, 0], [0, 3])
    for client, split in ((0, "heldout"), (1, "train")):
        read = store.read_rows(client, split)  # type: ignore[arg-type]
        assert read.num_rows == 0 and read.column_names == ["client", "prompt", "completion"]


def test_rows_across_row_groups(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [ROWS_PER_GROUP - 1, 2 * ROWS_PER_GROUP + 5, 3], [0, 1, 0])
    assert pq.ParquetFile(store.folder / "rows.parquet").num_row_groups == 4
    expected = [str(row) for row in range(ROWS_PER_GROUP - 1, 3 * ROWS_PER_GROUP + 4)]
    assert store.read_rows(1, "train")["prompt"].to_pylist() == expected
    assert store.read_rows(1, "heldout")["prompt"].to_pylist() == [str(3 * ROWS_PER_GROUP + 4)]
    assert store.read_rows(2, "train")["prompt"].to_pylist() == [str(3 * ROWS_PER_GROUP + 5 + i) for i in range(3)]


def test_it_travels_as_its_path(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [2000, 5], [0, 0])
    store.read_rows(0, "train")
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert pickle.loads(sent).read_rows(1, "train")["prompt"].to_pylist() == ["2000", "2001", "2002", "2003", "2004"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt), written_whole(folder) as scratch:
        (scratch / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(folder.parent.iterdir()) == []
    with written_whole(folder) as scratch:
        (scratch / "file").write_text("first")
        assert not folder.exists()
        with written_whole(folder) as rival:
            (rival / "file").write_text("rival")
    assert (folder / "file").read_text() == "rival"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError, match="folder"), written_whole(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
