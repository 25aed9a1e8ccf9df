import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_partition.core.types import TURNS, DataError
from datasets_partition.sources.files import ParquetFiles

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def written(path: Path, table: pa.Table, **fields: Any) -> ParquetFiles:
    pq.write_table(table, path)
    return ParquetFiles(path=str(path), **fields)


def test_other_columns_keep_their_types(tmp_path: Path) -> None:
    given = pa.table(
        {
            "when": pa.array([1, 2], pa.timestamp("s")),
            "prompt": pa.array(["a", "b"], pa.large_string()),
            "topic": pa.array(["x", "y"]).dictionary_encode(),
            "completion": pa.array(["c", "d"]).dictionary_encode(),
            "vector": pa.array([[0.5, 1.0], [2.0, 3.0]], pa.list_(pa.float32())),
            "client": pa.array([7, 8], pa.int8()),
        }
    )
    table = written(tmp_path / "rows.parquet", given).load().table
    text = pa.string()
    assert [(field.name, field.type) for field in table.schema] == [
        *((name, text) for name in ("client", "prompt", "completion", "topic")),
        ("vector", pa.list_(pa.float32())),
        ("when", pa.timestamp("ms")),  # Parquet's own unit
    ]
    assert table["client"].to_pylist() == ["7", "8"]
    assert table["vector"].to_pylist() == [[0.5, 1.0], [2.0, 3.0]]


def test_turns_are_read_from_structs(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "a", "name": None}], [{"role": "assistant", "content": "b", "name": None}]]
    table = written(tmp_path / "rows.parquet", pa.table({"messages": turns})).load().table
    assert table.schema.field("messages").type == TURNS
    assert table["messages"].to_pylist() == [
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
    ]


def test_rows_are_numbered_over_batches_and_anew_in_each_file(tmp_path: Path) -> None:
    texts = np.array([f"{i}" for i in range(40_000)], object)
    written(tmp_path / "a.parquet", pa.table({"text": texts}))
    texts[30_000] = None
    written(tmp_path / "b.parquet", pa.table({"text": texts}), on_bad_row="skip")
    with pytest.raises(DataError, match=r"/b\.parquet row 30001 has a null text: correct it"):
        ParquetFiles(path=str(tmp_path)).load()
    table, skipped = ParquetFiles(path=str(tmp_path), on_bad_row="skip").load()
    assert (table.num_rows, skipped) == (79_999, {"has a null text": 1})
    assert table["completion"][-1].as_py() == "39999"


def test_files_of_a_folder_need_not_have_the_same_columns_but_one_format(tmp_path: Path) -> None:
    written(tmp_path / "a.parquet", pa.table({"text": ["a"], "n": pa.array([1], pa.int8())}))
    written(tmp_path / "b.parquet", pa.table({"prompt": ["b"], "completion": ["c"], "n": [2], "m": ["x"]}))
    folder = ParquetFiles(path=str(tmp_path))
    assert folder.load().table.to_pydict() == {
        "prompt": ["", "b"],
        "completion": ["a", "c"],
        "m": [None, "x"],
        "n": [1, 2],
    }
    written(tmp_path / "c.parquet", pa.table({"prompt": ["b", "c"], "chosen": ["c", "d"], "rejected": ["d", "e"]}))
    with pytest.raises(DataError, match=r"c\.parquet row 1 is of another format .* \(preference of text, not prompt_c"):
        folder.load()
    table, skipped = ParquetFiles(path=str(tmp_path), on_bad_row="skip").load()
    assert (table.num_rows, skipped) == (2, {"is of another format than the rows before it": 2})


def test_the_keys_of_folders_are_columns(tmp_path: Path) -> None:
    given = pa.table({"text": ["a", "b", "c"], "client": ["x", "x", "y z"], "year": [1, 2, None]})
    pq.write_to_dataset(given, tmp_path / "rows", partition_cols=["client", "year"])
    table = ParquetFiles(path=str(tmp_path / "rows")).load().table
    assert table.select(["client", "completion", "year"]).to_pylist() == [
        {"client": "x", "completion": "a", "year": "1"},
        {"client": "x", "completion": "b", "year": "2"},
        {"client": "y z", "completion": "c", "year": None},
    ]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    source = written(tmp_path / "rows.parquet", pa.table({"text": broken}))
    with pytest.raises(DataError, match=r"rows\.parquet row 2 is not UTF-8: correct it"):
        source.load()
    skipping = ParquetFiles(path=source.path, on_bad_row="skip")
    assert skipping.load().table["completion"].to_pylist() == ["a", "c"]
    source = written(
        tmp_path / "rows.parquet", pa.table({"text": ["a", "b", "c"], "topic": broken.dictionary_encode()})
    )
    assert skipping.load().skipped == {"is not UTF-8": 1}
    content = pa.StructArray.from_arrays([pa.array(["user"] * 3), broken], ["role", "content"])
    turns = pa.ListArray.from_arrays([0, 1, 2, 3], content)
    written(tmp_path / "rows.parquet", pa.table({"messages": turns}))
    assert skipping.load().skipped == {"is not UTF-8": 1}


@pytest.mark.parametrize("keep", [slice(0, -20), slice(0, 3), slice(10, None), slice(0, 0)])
def test_a_file_that_is_not_whole(tmp_path: Path, keep: slice) -> None:
    source = written(tmp_path / "rows.parquet", pa.table({"text": ["a" * 99, "b"]}))
    path = Path(source.path)
    path.write_bytes(path.read_bytes()[keep])
    with pytest.raises(DataError, match=r"rows\.parquet is not a whole Parquet file \(.*\): fetch or write it again$"):
        source.load()


def test_a_file_with_garbage_inside(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.parquet", pa.table({"text": [f"{i}" for i in range(9999)]}))
    path = Path(source.path)
    content = bytearray(path.read_bytes())
    content[10:5000] = bytes(4990)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet is not a whole Parquet file"):
        source.load()


def test_a_columns_name_that_is_no_text(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.parquet", pa.table({"text": ["a"], "other": ["b"]}))
    path = Path(source.path)
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xffr"))
    with pytest.raises(DataError, match=r"rows\.parquet is not a whole Parquet file \(.*utf-8"):
        source.load()


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows: give"):
        written(tmp_path / "rows.parquet", pa.table({"text": pa.array([], pa.string())})).load()


def test_a_column_twice(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    with pytest.raises(DataError, match="has more than one column text: rename all but one of them"):
        written(tmp_path / "rows.parquet", twice).load()


@pytest.mark.slow
def test_many_short_rows_cost_little_more_than_their_text(tmp_path: Path, full: bool) -> None:
    million = np.arange(10**6).astype("U7").astype(object)
    table = pa.table({"client": np.arange(10**6) % 1000, "prompt": million, "completion": million})
    parts = 10 if full else 1
    with pq.ParquetWriter(tmp_path / "rows.parquet", table.schema) as writer:
        for _ in range(parts):
            writer.write_table(table)
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    loaded = ParquetFiles(path=str(tmp_path / "rows.parquet")).load().table
    assert loaded.num_rows == parts * 10**6
    assert pool.bytes_allocated() - before < 1.5 * loaded.nbytes


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_real_rows(tmp_path: Path) -> None:
    import gzip

    with gzip.open(DATA / "persona_preferences.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    table = written(tmp_path / "rows.parquet", pa.Table.from_pylist(rows)).load().table
    assert table.to_pylist() == rows
