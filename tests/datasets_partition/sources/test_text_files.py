from pathlib import Path

import pytest

from datasets_partition.core.types import DataError
from datasets_partition.sources.files import TextFiles

FILES = {
    "b.txt": b"\xef\xbb\xbfby itself\n",
    "ann/1.txt": b"one\r\n\r\ntwo\nlines\n\n \n three ",
    "ann/deep/2.md": b"four",
    "bob/blank.txt": b" \n\n",
    "bob/3.html": b"not wanted",
    ".git/4.txt": b"hidden",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_files_are_rows_of_their_subfolder(folder: Path) -> None:
    table, skipped = TextFiles(path=str(folder)).load()
    assert table.to_pylist() == [
        {"client": "ann", "prompt": "", "completion": "one\r\n\r\ntwo\nlines\n\n \n three ", "file": "ann/1.txt"},
        {"client": "ann", "prompt": "", "completion": "four", "file": "ann/deep/2.md"},
        {"client": "b", "prompt": "", "completion": "by itself\n", "file": "b.txt"},
    ]
    assert skipped == {}


def test_paragraphs_are_rows(folder: Path) -> None:
    table = TextFiles(path=str(folder), split="paragraph", suffixes=(".txt",)).load().table
    assert table["completion"].to_pylist() == ["one", "two\nlines", "three", "by itself"]
    assert table["client"].to_pylist() == ["ann", "ann", "ann", "b"]


def test_one_file_has_one_client(folder: Path) -> None:
    table = TextFiles(path=str(folder / "ann" / "1.txt"), split="paragraph").load().table
    assert set(table["client"].to_pylist()) == {"1"}
    assert set(table["file"].to_pylist()) == {"1.txt"}


def test_a_file_that_is_no_text(folder: Path) -> None:
    (folder / "ann" / "0.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"/ann/0\.txt is not UTF-8 \(invalid start byte\): correct it, or leave such"):
        TextFiles(path=str(folder)).load()
    table, skipped = TextFiles(path=str(folder), on_bad_row="skip").load()
    assert (table.num_rows, skipped) == (3, {"is not UTF-8": 1})


def test_nothing_to_read(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a folder without a file that ends in \.rst: correct the path"):
        TextFiles(path=str(folder), suffixes=(".rst",)).load()
    with pytest.raises(DataError, match=r"bob has no rows: give"):
        TextFiles(path=str(folder / "bob")).load()
    with pytest.raises(DataError, match=r"data\.source\.suffixes names no endings"):
        TextFiles(path=str(folder), suffixes=("",))
