import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition.core.types import DataError
from datasets_partition.formats import conversion
from datasets_partition.sources.files import Jsonl

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def written(folder: Path, *rows: object, name: str = "rows.jsonl", **fields: Any) -> Jsonl:
    path = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return Jsonl(path=str(path), **fields)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_other_columns_keep_their_types_and_clients_are_text(tmp_path: Path, name: str) -> None:
    source = written(
        tmp_path,
        {"completion": "b", "prompt": "a", "client": 7, "topic": True, "tags": ["x"], "at": {"b": 1}, "any": 1},
        {"completion": "d", "prompt": "ç", "client": "z", "topic": None, "score": 0.5, "any": "1"},
        name=name,
    )
    table, skipped = source.load()
    assert table.column_names == ["client", "prompt", "completion", "any", "at", "score", "tags", "topic"]
    common = {"client": "7", "prompt": "a", "completion": "b"}
    assert table.to_pylist() == [
        common | {"any": "1", "at": '{"b": 1}', "score": None, "tags": ["x"], "topic": True},
        common
        | {"client": "z", "prompt": "ç", "completion": "d", "any": "1", "at": None, "score": 0.5}
        | {"tags": None, "topic": None},
    ]
    assert skipped == {}


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert Jsonl(path=str(path)).load().table["completion"].to_pylist() == ["a", "b"]


def test_batches_of_rows_join_where_their_columns_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_BATCH", 2)
    rows = [
        {"text": "a", "n": 1},
        {"text": "b", "n": 2},
        {"text": "c", "kind": "x", "n": 0.5},
        {"text": "d", "n": None},
    ]
    assert written(tmp_path, *rows).load().table.to_pydict() == {
        "prompt": [""] * 4,
        "completion": ["a", "b", "c", "d"],
        "kind": [None, None, "x", None],
        "n": [1.0, 2.0, 0.5, None],
    }
    table = written(tmp_path, *rows, {"text": "e", "n": "many"}, {"text": "f", "n": [1]}).load().table
    assert table["n"].to_pylist() == ["1", "2", "0.5", None, "many", "[1]"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for number, name in enumerate(["c.jsonl", "b/a.jsonl.gz", "b/z.txt", ".hidden/a.jsonl", "a.jsonl"]):
        written(tmp_path, {"text": str(number)}, name=name)
    source = Jsonl(path=str(tmp_path))
    assert source.load().table["completion"].to_pylist() == ["4", "1", "0"]
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": 1}')
    with pytest.raises(DataError, match=r"/c\.jsonl line 2 has no text as its text \(it is int\): correct it"):
        source.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b'{"text": "a"}\n{"text": \n',
            r"line 2 is not JSON \(Expecting value at its end; each line must be one whole row",
        ),
        (b'{"text": "a" "b"}\n', r"line 1 is not JSON \(Expecting ',' delimiter at character 14; each line"),
        (b'{\n  "text": "a"\n}\n', r"line 1 is not JSON \(.* at its end; each line must be one whole row, as jq -c"),
        (b'{"text": "a"}\n\n[1]\n', "line 3 is not a JSON object: correct it"),
        (b'{"text": "\xff"}\n', r"line 1 is not UTF-8 \(.*; save the file as UTF-8\): correct"),
        (b'{"text": "\\ud800"}\n', r"line 1 is not UTF-8 \(.*; save the file as UTF-8\): correct"),
        (b"[" * 100_000, r"line 1 is not JSON \("),
        (
            b'{"prompt": "a", "chosen": "b"}\n',
            r"line 1 fits no format \(its columns are prompt \(str\), chosen \(str\);",
        ),
        (b'{"text": "a", "client": null}\n', "line 1 has a null or empty client: correct it"),
        (
            b'{"text": "a", "client": ["b"]}\n',
            r'line 1 has a client that is neither text nor a number \(\["b"\]\): correct',
        ),
        (b"\n \n", r"rows.jsonl has no rows: give data\.source something that has"),
    ],
)
def test_what_is_not_a_row_is_named_by_its_line(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message):
        Jsonl(path=str(path)).load()


def test_the_first_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"foo": 1}\n{"text": "b"}\nnot json\n')
    with pytest.raises(DataError, match="line 2 fits no format"):
        Jsonl(path=str(path)).load()


def test_a_whole_number_is_the_same_client_however_it_is_written(tmp_path: Path) -> None:
    rows = [{"text": "a", "client": client, "key": client} for client in (1, 1.0, "1", 1.5)]
    table = written(tmp_path, *rows).load().table
    assert table["client"].to_pylist() == table["key"].to_pylist() == ["1", "1", "1", "1.5"]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04", r'rows\.jsonl is a Parquet file: read it with data\.source\.kind = "parquet"'),
        (b'\n[{"text": "a"}', r"rows\.jsonl is no whole JSON array \(.*\): correct it"),
        (b'\xef\xbb\xbf[\n  {"text": "a"},\n]', r"rows\.jsonl is no whole JSON array"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes, message: str, on_bad_row: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Jsonl(path=str(path), on_bad_row=on_bad_row).load()


def test_bad_lines_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'no\n{"text": "a"}\n\n{"text": "\xff"}\n{"text": null}\nnor this\n')
    table, skipped = Jsonl(path=str(path), on_bad_row="skip").load()
    assert table["completion"].to_pylist() == ["a"]
    assert skipped == {"is not JSON": 2, "is not UTF-8": 1, "has a null text": 1}


@pytest.mark.parametrize("spoil", [lambda whole: whole[:-9], lambda whole: b'{"text": "a"}', lambda whole: whole[:99]])
def test_a_file_that_is_not_whole_gzip_is_an_error(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(spoil(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(999)))))
    with pytest.raises(DataError, match=r"not a whole gzip file .*: fetch or compress it again"):
        Jsonl(path=str(path), on_bad_row="skip").load()


def test_gzip_is_read_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert Jsonl(path=str(path)).load().table["completion"].to_pylist() == ["a"]


VALUES = st.none() | st.text(max_size=5) | st.booleans() | st.integers(-(2**40), 2**40) | st.lists(st.integers(0, 9))


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"prompt": st.text(max_size=9), "completion": st.text(max_size=9)}, optional={"a": VALUES, "b": VALUES}
        ),
        min_size=1,
        max_size=9,
    )
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    table = written(tmp_path_factory.mktemp("rows"), *rows).load().table
    for name in ("prompt", "completion"):
        assert table[name].to_pylist() == [row[name] for row in rows]
    for name in table.column_names[2:]:
        read = table[name].to_pylist()
        as_text = [value if value is None or isinstance(value, str) else json.dumps(value) for value in read]
        values = [row.get(name) for row in rows]
        assert as_text == [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("name", "rows", "clients", "columns"),
    [
        ("tldr_en", 32_136, 1_819, ["client", "prompt", "completion", "command", "platform"]),
        ("shakespeare", 7_095, 298, ["client", "prompt", "completion"]),
        ("persona_preferences", 14_000, 14, ["client", "prompt", "chosen", "rejected"]),
    ],
)
def test_real_rows(name: str, rows: int, clients: int, columns: list[str]) -> None:
    table, skipped = Jsonl(path=str(DATA / f"{name}.jsonl.gz")).load()
    assert (table.num_rows, table.column_names, skipped) == (rows, columns, {})
    assert len(table["client"].unique()) == clients
