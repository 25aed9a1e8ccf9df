import gzip
from pathlib import Path

import pytest
from pyarrow import fs

from datasets_partition.core.types import DataError
from datasets_partition.sources import location as module
from datasets_partition.sources.files import Jsonl
from datasets_partition.sources.location import fingerprint, source_files


def names(location: str) -> list[str]:
    return [file.relative for file in source_files(location, (".a", ".b"))]


def test_a_folder_has_an_order_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    for name in ("z.a", "b/z.b", "b/a.a", "b.a", "c.c", ".d.a", ".e/f.a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for location in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
        assert names(location) == ["b.a", "b/a.a", "b/z.b", "z.a"]
    assert source_files(str(tmp_path), (".b",))[0].name == f"{tmp_path}/b/z.b"


def test_capitals_in_an_ending_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "x.A").touch()
    (tmp_path / "ROWS.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "a"}'))
    assert names(str(tmp_path)) == ["x.A"]
    assert Jsonl(path=str(tmp_path)).load().table["completion"].to_pylist() == ["a"]


def test_a_path_may_start_at_home_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.a").write_text("content")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for location in ("~/x.a", "x.a", f"file://{tmp_path}/x.a"):
        (file,) = source_files(location, (".a",))
        assert file.name == location
        with file.opened() as stream:
            assert stream.read() == b"content"


def test_a_relative_path_that_is_not_there_is_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried = rf"is 'rows/x\.a', and there is no file or folder {tmp_path}/rows/x\.a \(relative paths start at the folder"
    with pytest.raises(DataError, match=tried):
        names("rows/x.a")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.source\.path is '.*none', where there is no file or folder: correct"):
        names(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"a folder without a file that ends in \.a or \.b: correct the path"):
        names(str(tmp_path))
    with pytest.raises(DataError, match=r"^nothing://x is not a location that can be read: "):
        names("nothing://x")
    with pytest.raises(DataError, match=r"^data\.source\.name is"):
        source_files(str(tmp_path), (".a",), "data.source.name")


def test_the_fingerprint_is_of_names_and_bytes(tmp_path: Path) -> None:
    def current() -> str:
        return fingerprint(source_files(str(tmp_path), (".a",)))

    seen = []
    (tmp_path / "x.a").write_text("1")
    seen.append(current())
    (tmp_path / "x.a").write_text("2")
    seen.append(current())
    (tmp_path / "x.a").rename(tmp_path / "y.a")
    seen.append(current())
    (tmp_path / "z.a").write_text("")
    seen.append(current())
    assert len(set(seen)) == 4
    (tmp_path / "other.b").touch()
    (tmp_path / "z.a").touch()
    assert current() == seen[-1]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> fs.FileSystem:
    """A file system in memory, which is found under mock://."""
    system, _ = fs.FileSystem.from_uri("mock:///")
    located = module.located
    monkeypatch.setattr(module, "located", lambda uri: (system, uri[8:]) if uri.startswith("mock://") else located(uri))
    return system


def test_another_file_system(elsewhere: fs.FileSystem) -> None:
    elsewhere.create_dir("rows/b")
    for name, text in (("rows/b/1.jsonl", '{"text": "a"}\n'), ("rows/2.jsonl", '{"text": "b"}\n')):
        with elsewhere.open_output_stream(name) as file:
            file.write(text.encode())
    source = Jsonl(path="mock:///rows")
    assert source.load().table["completion"].to_pylist() == ["b", "a"]
    before = source.fingerprint()
    assert before == source.fingerprint()
    with elsewhere.open_output_stream("rows/2.jsonl") as file:
        file.write(b'{"text": "c"}\n{}')
    assert source.fingerprint() != before
    with pytest.raises(DataError, match=r"^mock:///rows/2\.jsonl line 2 fits no format"):
        source.load()
    with pytest.raises(DataError, match=r"is 'mock:///none', where there is no file or folder"):
        Jsonl(path="mock:///none").load()


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.a").touch()
    (file,) = source_files(str(tmp_path), (".a",))
    (tmp_path / "x.a").unlink()
    with pytest.raises(DataError, match=r"x\.a cannot be read: .*No such file"), file.opened():
        pass
