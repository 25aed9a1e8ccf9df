import os
from pathlib import Path
from typing import Any

import pytest

from engine.system.atomic import write_file, write_folder


def fail_at(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Moving something to `target` fails from now on, as when the disk is full."""
    replace = os.replace

    def moved(source: Any, destination: Any) -> None:
        if Path(destination) == target:
            raise OSError(28, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", moved)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"one, which is longer")
    write_file(path, b"two")
    assert content(tmp_path) == {"a": b"two"}


def test_a_folder_is_written_and_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    write_folder(folder, {"a": b"1", "b": b"2"}.items())
    write_folder(folder, {"b": b"3", "c": b""}.items())
    assert content(folder) == {"b": b"3", "c": b""}
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_what_a_kill_left_aside_is_in_nobodys_way(tmp_path: Path) -> None:
    folder, aside = tmp_path / "folder", tmp_path / ".folder.old"
    for left in (folder, aside):
        write_folder(left, {"a": b"old"}.items())
    write_folder(folder, {"a": b"new"}.items())
    assert content(folder) == {"a": b"new"} and not aside.exists()


def test_what_a_killed_process_has_left_of_a_folder_is_removed(tmp_path: Path) -> None:
    for name in (".model.4711", ".model.notes", ".models.4711"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"1")
    write_folder(tmp_path / "model", [("file", b"2")])
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model.notes", ".models.4711"}


def test_a_file_that_cannot_be_moved_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")
    fail_at(monkeypatch, path)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert content(tmp_path) == {"a": b"old"}


def test_a_file_of_a_folder_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_folder(tmp_path / "folder", {"a": b"1", "b": None}.items())  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_moved_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, {"a": b"old"}.items())
    fail_at(monkeypatch, folder)
    with pytest.raises(OSError, match="No space"):
        write_folder(folder, {"a": b"new"}.items())
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert content(folder) == {"a": b"old"}
