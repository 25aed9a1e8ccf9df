import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.continuous import ByLength, Continuous
from datasets_partition.partitioners.natural import ByTime, Natural
from datasets_partition.sources.files import CsvFiles


def written(folder: Path, content: bytes, name: str = "rows.csv", **fields: Any) -> CsvFiles:
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return CsvFiles(path=str(folder / name), **fields)


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_all_columns_are_text(tmp_path: Path, name: str) -> None:
    content = b'client,question,completion,n,ok,topic\n007,1,2.50,3,true,\n8,"a\nb, ""c""",,,false,x\n'
    table = written(tmp_path, content, name, columns={"prompt": "question"}).load().table
    assert table.to_pylist() == [
        {"client": "007", "prompt": "1", "completion": "2.50", "n": "3", "ok": "true", "topic": ""},
        {"client": "8", "prompt": 'a\nb, "c"', "completion": "", "n": "", "ok": "false", "topic": "x"},
    ]


def test_a_boolean_label_is_a_preference_and_a_number_is_not(tmp_path: Path) -> None:
    source = written(tmp_path, b"prompt,completion,label\na,b,true\n")
    assert source.load().table.column_names == ["prompt", "completion", "label"]
    assert source.load().table["label"].to_pylist() == [True]
    for last in (b"1", b"maybe"):
        table = written(tmp_path, b"prompt,completion,label\na,b,true\nc,d," + last).load().table
        assert table["label"].to_pylist() == ["true", last.decode()]
    source = written(tmp_path, b"prompt,completion,label\na,b,True\nc,d,\ne,f,FALSE\n", on_bad_row="skip")
    assert source.load().table["label"].to_pylist() == [True, False]
    assert source.load().skipped == {"has a null label": 1}
    table = written(tmp_path, b"text,label\na,true\n", columns={"prompt": "text", "completion": "label"}).load().table
    assert table["completion"].to_pylist() == ["true"]


def test_keys_that_are_the_same_number_are_two_clients(tmp_path: Path) -> None:
    table = written(tmp_path, b"text,user\na,007\nb,7\n").load().table
    assert Natural(key="user").assign(table, np.random.default_rng(0)).names.to_pylist() == ["007", "7"]


def test_partitioners_read_numbers_and_times_from_text(tmp_path: Path) -> None:
    content = b"client,text,n,day\nx,abc,10,2024-10-01\nx,a,9,2024-09-30\nx,ab,-1,2024-10-02\n"
    table, rng = written(tmp_path, content).load().table, np.random.default_rng(0)
    assert Continuous(column="n", clients=3).assign(table, rng).clients.tolist() == [2, 1, 0]
    assert ByLength(clients=3).assign(table, rng).clients.tolist() == [2, 0, 1]
    for time, expected in (("n", [2, 1, 0]), ("day", [1, 0, 2])):
        order = ByTime(time=time).assign(table, rng).order
        assert order is not None and order.tolist() == expected


def test_rows_that_do_not_match_the_header_keep_the_numbers_right(tmp_path: Path) -> None:
    content = b"client,text\nx,a\nb\nx,c,d\ny,e\n,f\n"
    with pytest.raises(DataError, match=r"rows\.csv line 3 has more or fewer values than the header: correct it"):
        written(tmp_path, content).load()
    table, skipped = written(tmp_path, content, on_bad_row="skip").load()
    assert table["completion"].to_pylist() == ["a", "e"]
    assert skipped == {"has more or fewer values than the header": 2, "has a null or empty client": 1}
    with pytest.raises(DataError, match=r"rows\.csv line 4 has a null or empty client"):
        written(tmp_path, b"client,text\nx,a\ny,e\n,f\n").load()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.csv line 3 is not UTF-8: correct it"):
        written(tmp_path, b"text,topic\na,x\nb,\xff\n").load()
    assert written(tmp_path, b"text\na\n\xff\n", on_bad_row="skip").load().skipped == {"is not UTF-8": 1}
    for content in (b"te\xffxt\na\n", "text\na\n".encode("utf-16")):
        with pytest.raises(DataError, match=r"rows\.csv is not UTF-8: save it as UTF-8"):
            written(tmp_path, content).load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows\.csv is empty: give it a header and rows"),
        (b"text\n", r"rows\.csv has no rows: give"),
        (b"a;b\nc;d\n", r"rows\.csv has the columns a, b, which fit no format"),
        (b"text,text\na,b\n", "has more than one column text"),
        (b"question,text\na,b\n", "has the columns question"),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    columns = {"prompt": "question"} if b"question" in content else {}
    if columns:
        content, message = (
            content.replace(b"question", b"q"),
            r"columns\.prompt names 'question', which .* name one of q, t",
        )
    with pytest.raises(DataError, match=message):
        written(tmp_path, content, columns=columns).load()


def test_the_first_bad_row_is_named_by_its_first_line(tmp_path: Path) -> None:
    content = b'client,text\r\n\r\nx,"a\r\nb"\r\n\r\n,c\r\ny\r\nz,"d"e\r\n'
    with pytest.raises(DataError, match=r"rows\.csv line 6 has a null or empty client"):
        written(tmp_path, content).load()
    with pytest.raises(DataError, match=r"rows\.csv line 7 has more or fewer values"):
        written(tmp_path, content.replace(b",c", b"x,c")).load()
    table, skipped = written(tmp_path, content, on_bad_row="skip").load()
    assert table["completion"].to_pylist() == ["a\r\nb"]
    reasons = ("has a null or empty client", "has more or fewer values than the header", "is not CSV")
    assert skipped == dict.fromkeys(reasons, 1)


def test_quotes_that_are_not_csv(tmp_path: Path) -> None:
    for line in (b'"c"d', b'"c\nd'):
        with pytest.raises(DataError, match=r"rows\.csv line 3 is not CSV \(.*; a quote within quotes is written"):
            written(tmp_path, b"text\na\n" + line).load()
    with pytest.raises(DataError, match=r"rows\.csv has a header that is not CSV \(.*\): correct it"):
        written(tmp_path, b'"a"b\nc\n').load()


def test_a_value_may_be_long_and_a_parquet_file_is_refused(tmp_path: Path) -> None:
    long = "a" * 200_000
    assert written(tmp_path, b"text\n" + long.encode()).load().table["completion"].to_pylist() == [long]
    with pytest.raises(DataError, match=r'rows\.csv is a Parquet file: read it with data\.source\.kind = "parquet"'):
        written(tmp_path, b"PAR1\x00").load()


def test_a_file_that_is_not_whole_gzip(tmp_path: Path) -> None:
    source = written(tmp_path, b"text\n" + b"a\n" * 999, "rows.csv.gz")
    path = Path(source.path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"rows\.csv\.gz is not a whole gzip file .*: fetch or compress it again"):
        source.load()
