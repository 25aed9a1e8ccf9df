"""Files as they are published: JSON arrays, compression, other separators, folders of both."""

import bz2
import gzip
import json
import lzma
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.sources.files import CsvFiles, Jsonl, ParquetFiles

ROWS = [{"text": "a", "n": 1}, {"text": "ü", "n": 2}]
PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def texts(source: Any) -> list[str]:
    return source.load().table["completion"].to_pylist()


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_array_of_rows(tmp_path: Path, indent: int | None, mark: bytes) -> None:
    (tmp_path / "alpaca.json").write_bytes(mark + json.dumps(ROWS, indent=indent).encode())
    for path in (tmp_path, tmp_path / "alpaca.json"):
        assert texts(Jsonl(path=str(path))) == ["a", "ü"]


def test_a_bad_item_of_an_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*ROWS, {"text": 7}, "x"]))
    with pytest.raises(DataError, match=r"rows\.json item 3 has no text as its text \(it is int\): correct it"):
        Jsonl(path=str(path)).load()
    assert Jsonl(path=str(path), on_bad_row="skip").load().skipped == {
        "has no text as its text": 1,
        "is not a JSON object": 1,
    }


def test_facts_beside_lines_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    before = Jsonl(path=str(tmp_path)).fingerprint()
    (tmp_path / "dataset_info.json").write_text('{"license": "mit"}')
    assert texts(Jsonl(path=str(tmp_path))) == ["a"] and Jsonl(path=str(tmp_path)).fingerprint() == before


@pytest.mark.parametrize("ending", PACKED)
def test_compressed_lines_and_tables(tmp_path: Path, ending: str) -> None:
    lines = "".join(json.dumps(row) + "\r\n" for row in ROWS).encode()
    (tmp_path / f"rows.jsonl{ending}").write_bytes(PACKED[ending](lines))
    assert texts(Jsonl(path=str(tmp_path))) == ["a", "ü"]
    (tmp_path / "rows").write_bytes(PACKED[ending](lines))  # by its content, under any name
    assert texts(Jsonl(path=str(tmp_path / "rows"))) == ["a", "ü"]
    (tmp_path / f"rows.csv{ending}").write_bytes(PACKED[ending]("text,n\na,1\nü,2\n".encode()))
    assert texts(CsvFiles(path=str(tmp_path))) == ["a", "ü"]


@pytest.mark.parametrize("ending", PACKED)
def test_a_compressed_file_that_is_cut_off(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(PACKED[ending](json.dumps(ROWS[0]).encode() * 100)[:-9])
    with pytest.raises(DataError, match=r"rows\.jsonl\.\w+ is not a whole \w+ file \(.*\): fetch or compress it again"):
        Jsonl(path=str(path)).load()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_header_says_what_separates_values(tmp_path: Path, separator: str) -> None:
    content = separator.join(("prompt", '"completion"')) + "\n" + separator.join(('"a, b; c\td|e"', "f")) + "\n"
    (tmp_path / "rows.csv").write_text(content)
    table = CsvFiles(path=str(tmp_path)).load().table
    assert table.to_pylist() == [{"prompt": "a, b; c\td|e", "completion": "f"}]


def test_a_table_of_tabs_and_one_of_a_single_column(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("text\tn\r\na;b,c\t1\r\n")
    assert texts(CsvFiles(path=str(tmp_path))) == ["a;b,c"]
    (tmp_path / "rows.csv").write_text("text\na;b\n")
    assert texts(CsvFiles(path=str(tmp_path))) == ["a;b"]


def test_messages_as_json_text_in_a_table(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'Say "a"'}, {"role": "assistant", "content": "a"}]
    quoted = json.dumps(turns).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'client;messages\nx;"{quoted}"\n')
    assert CsvFiles(path=str(tmp_path)).load().table["messages"].to_pylist() == [turns]


def test_a_folder_without_such_files_names_the_endings(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet.gz").touch()
    with pytest.raises(DataError, match=r"a folder without a file that ends in \.jsonl or \.json: correct the path"):
        Jsonl(path=str(tmp_path)).load()
    with pytest.raises(DataError, match=r"a folder without a file that ends in \.parquet: correct the path"):
        ParquetFiles(path=str(tmp_path)).load()


def test_types_that_hold_text_and_turns_in_parquet(tmp_path: Path) -> None:
    coded = pa.array(["user", "assistant"]).dictionary_encode()
    turns = pa.StructArray.from_arrays([coded, pa.array(["Say a", "a"], pa.large_string())], ["role", "content"])
    columns = {
        "messages": pa.LargeListArray.from_arrays(pa.array([0, 2], pa.int64()), turns),
        "client": pa.array([Decimal("7.50")]),
        "topic": pa.array(["x"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    (row,) = ParquetFiles(path=str(tmp_path)).load().table.to_pylist()
    assert row["messages"] == [{"role": "user", "content": "Say a"}, {"role": "assistant", "content": "a"}]
    assert (row["client"], row["topic"]) == ("7.50", "x")


def test_keys_that_are_left_out_make_another_store(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a", "lang": "en"}]}))
    plain, without = Jsonl(path=str(path)), Jsonl(path=str(path), leave_out=("lang",))
    assert (repr(plain), plain.fingerprint() == without.fingerprint()) == (repr(without), False)
    with pytest.raises(DataError, match=r'line 1 has a turn .* with the key \'lang\', .*leave_out = \["lang"\]'):
        plain.load()
    assert without.load().table.num_rows == 1
