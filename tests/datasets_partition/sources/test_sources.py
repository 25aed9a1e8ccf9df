"""What every source has in common, and that the same rows are the same table whatever file they come from."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition import Sources
from datasets_partition.core.types import DataError, Source, content_columns
from datasets_partition.sources.files import CsvFiles, Jsonl, ParquetFiles, TextFiles
from datasets_partition.sources.hf_datasets import HfDatasets
from datasets_partition.sources.python_docs import PythonDocs

Row = dict[str, Any]


def as_jsonl(rows: list[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(rows: list[Row], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def as_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def as_dataset(rows: list[Row], path: Path) -> None:
    Dataset.from_list(rows).save_to_disk(path)


def as_text(rows: list[Row], path: Path) -> None:
    for number, row in enumerate(rows):
        file = path / str(row["client"]) / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        # What is null elsewhere is no UTF-8 here, so that each source has a bad row.
        file.write_bytes(b"\xff" if row["text"] is None else row["text"].encode())


FILES: dict[str, tuple[Callable[[list[Row], Path], None], Callable[..., Source]]] = {
    "jsonl": (as_jsonl, lambda path, **fields: Jsonl(path=path, **fields)),
    "parquet": (as_parquet, lambda path, **fields: ParquetFiles(path=path, **fields)),
    "csv": (as_csv, lambda path, **fields: CsvFiles(path=path, **fields)),
    "datasets": (as_dataset, lambda path, **fields: HfDatasets(name=path, **fields)),
    "text": (as_text, lambda path, **fields: TextFiles(path=path, **fields)),
}
ROWS: list[Row] = [{"client": f"c{i % 3}", "text": f"text {i}"} for i in range(9)]


def test_the_registry_is_tested_whole() -> None:
    assert {get_args(kind.__annotations__["kind"])[0] for kind in get_args(Sources)} == {*FILES, "python_docs"}


@pytest.mark.parametrize("kind", FILES)
def test_the_fingerprint_follows_the_content(kind: str, tmp_path: Path) -> None:
    write, make = FILES[kind]
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    for path, rows in ((first, ROWS), (same, ROWS), (other, ROWS[:-1])):
        write(rows, path)
    source = make(str(first))
    assert source.fingerprint() == source.fingerprint()
    assert source.fingerprint() != make(str(other)).fingerprint()
    if kind != "datasets":  # which writes a random fingerprint of its own into each folder
        assert source.fingerprint() == make(str(same)).fingerprint()


@pytest.mark.parametrize("kind", [*FILES, "python_docs"])
def test_rows_come_in_the_same_order_with_their_clients(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdlib_module_names", frozenset({"json"}))
    if kind == "python_docs":
        source: Source = PythonDocs(packages=())
    else:
        FILES[kind][0](ROWS, tmp_path / "rows")
        source = FILES[kind][1](str(tmp_path / "rows"))
    table, skipped = source.load()
    assert table.equals(source.load().table)
    assert skipped == {}
    assert table.column_names[:3] == ["client", *content_columns(table)] == ["client", "prompt", "completion"]
    assert {table.schema.field(name).type for name in ("client", "prompt", "completion")} == {pa.string()}
    if kind != "python_docs":
        order = sorted(ROWS, key=lambda row: row["client"]) if kind == "text" else ROWS
        assert table["completion"].to_pylist() == [row["text"] for row in order]


@pytest.mark.parametrize("kind", FILES)
def test_the_number_of_rows_read_is_reported(kind: str, tmp_path: Path) -> None:
    write, make = FILES[kind]
    write(ROWS, tmp_path / "rows")
    reported: list[int] = []
    make(str(tmp_path / "rows")).load(reported.append)  # type: ignore[call-arg]
    assert reported == [9]


@pytest.mark.parametrize("kind", sorted(FILES.keys() - {"csv"}))  # in which nothing is null
def test_no_row_is_lost(kind: str, tmp_path: Path) -> None:
    write, make = FILES[kind]
    rows = [row | {"text": None if number in (2, 7) else row["text"]} for number, row in enumerate(ROWS)]
    write(rows, tmp_path / "rows")
    with pytest.raises(
        DataError, match=r'(row 3|line 3|7\.txt) .*: correct it, or .* data\.source\.on_bad_row = "skip"'
    ):
        make(str(tmp_path / "rows")).load()
    table, skipped = make(str(tmp_path / "rows"), on_bad_row="skip").load()
    assert table.num_rows + sum(skipped.values()) == len(rows)
    assert skipped == {"is not UTF-8" if kind == "text" else "has a null text": 2}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_nan_is_no_client(kind: str, tmp_path: Path) -> None:
    write, make = FILES[kind]
    write([{"text": f"{client}", "client": client} for client in (1.0, float("nan"), 2.5)], tmp_path / "rows")
    with pytest.raises(DataError, match=r"(row|line) 2 has a null or empty client: correct it"):
        make(str(tmp_path / "rows")).load()
    table, skipped = make(str(tmp_path / "rows"), on_bad_row="skip").load()
    assert table["client"].to_pylist() == ["1", "2.5"] and skipped == {"has a null or empty client": 1}


def test_nan_among_text_is_null(tmp_path: Path) -> None:
    as_jsonl([{"text": "a", "topic": "x"}, {"text": "b", "topic": float("nan")}], tmp_path / "rows")
    assert Jsonl(path=str(tmp_path / "rows")).load().table["topic"].to_pylist() == ["x", None]


@pytest.mark.parametrize("kind", FILES)
def test_a_missing_file_is_an_error_of_both_methods(kind: str, tmp_path: Path) -> None:
    source = FILES[kind][1](str(tmp_path / "none"))
    for method in (source.load, source.fingerprint):
        with pytest.raises(DataError, match=r"^data\.source\.(path|name) is '.*none', .*: correct the"):
            method()


@pytest.mark.parametrize("kind", sorted(FILES.keys() - {"text", "datasets"}))
def test_an_empty_folder_is_an_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a folder without a file that ends in \..*: correct the path"):
        FILES[kind][1](str(tmp_path)).load()


@pytest.mark.parametrize("kind", sorted(FILES.keys() - {"text"}))
def test_columns_that_are_missing_name_those_that_exist(kind: str, tmp_path: Path) -> None:
    write, make = FILES[kind]
    write([{"question": "a", "answer": "b"}], tmp_path / "rows")
    with pytest.raises(DataError, match=r"question.*answer.*(name yours in data\.source\.columns|it needs) .*messages"):
        make(str(tmp_path / "rows")).load()
    with pytest.raises(DataError, match=r"data\.source\.columns.*question.*answer"):
        make(str(tmp_path / "rows"), columns={"prompt": "q"}).load()
    columns = {"prompt": "question", "completion": "answer"}
    assert make(str(tmp_path / "rows"), columns=columns).load().table.to_pylist() == [
        {"prompt": "a", "completion": "b"}
    ]


@pytest.mark.parametrize("kind", sorted(FILES.keys() - {"text"}))
def test_columns_that_no_form_reads_are_refused(kind: str, tmp_path: Path) -> None:
    write, make = FILES[kind]
    write(ROWS, tmp_path / "rows")
    with pytest.raises(
        DataError, match=r"data\.source\.columns has 'txet', .*: on the left .*prompt, .*text.* client;"
    ):
        make(str(tmp_path / "rows"), columns={"txet": "text"}).load()


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"prompt": TEXTS, "completion": TEXTS, "client": TEXTS.filter(bool), "n": st.integers(-(2**62), 2**62)}
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_same_rows_are_the_same_table(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    tables = []
    for kind in ("jsonl", "parquet", "csv"):
        write, make = FILES[kind]
        write(rows, folder / kind)
        tables.append(make(str(folder / kind)).load().table)
    assert tables[0].to_pylist() == rows
    assert tables[0].equals(tables[1])
    assert tables[0].cast(tables[2].schema).equals(tables[2])  # a CSV file has text only
