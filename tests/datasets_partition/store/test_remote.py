"""Stores at a URI: file://, and s3:// on a server that speaks its protocol."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources import location
from datasets_partition.sources.files import Jsonl
from datasets_partition.sources.location import located, node_cache, within
from datasets_partition.store import build as building
from datasets_partition.store import sealed
from datasets_partition.store.build import build
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import Store


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jsonl:
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"client": i % 3, "text": f"text {i}"}) + "\n" for i in range(60)))
    return Jsonl(path=path.as_uri())


def test_a_store_at_a_uri_is_made_once_and_fetched_by_other_machines(
    source: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = (tmp_path / "shared").as_uri()
    first = build(source, Natural(), Splits(), 7, cache)
    assert first.parent == node_cache()
    there = tmp_path / "shared" / first.name
    assert {path.name for path in there.iterdir()} == {"rows.parquet", "index.arrow", "manifest.json"}
    rows = Store.open(first).read_rows(1, "train")

    shutil.rmtree(first)
    monkeypatch.setattr(building, "_prepare", None)  # building again would fail
    assert build(source, Natural(), Splits(), 7, cache) == first
    assert Store.open(first).read_rows(1, "train") == rows


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket of an object store on loopback, whose keys come from the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"?scheme=http&region=us-east-1&allow_bucket_creation=true&endpoint_override={host}:{port}"
    try:
        system, _ = located(f"s3://bucket{options}")
        system.create_dir("bucket")
        yield f"s3://bucket{options}"
    finally:
        server.stop()


def test_rows_and_stores_in_an_object_store(
    source: Jsonl, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system, path = located(within(bucket, "data"))
    fs.copy_files(str(tmp_path / "rows.jsonl"), f"{path}/rows.jsonl", destination_filesystem=system)
    cache, elsewhere = within(bucket, "stores"), Jsonl(path=within(bucket, "data"))
    first = build(elsewhere, Natural(), Splits(), 7, cache)
    rows = Store.open(first).read_rows(1, "train")
    assert rows["completion"].to_pylist()[0].startswith("text ")
    shutil.rmtree(first)
    with monkeypatch.context() as patched:
        patched.setattr(building, "_prepare", None)  # building again would fail
        assert build(elsewhere, Natural(), Splits(), 7, cache) == first
    assert Store.open(first).read_rows(1, "train") == rows
    assert build(source, Natural(), Splits(), 7, cache) != first
    with pytest.raises(DataError, match=r"data\.source\.path is .*none.*, where there is no file or folder"):
        build(Jsonl(path=within(bucket, "none")), Natural(), Splits(), 7, cache)


def test_a_server_that_does_not_answer_is_named(source: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    gone = "s3://bucket/stores?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:1"
    with pytest.raises(DataError, match=r"data\.cache cannot be read at s3://bucket"):
        build(source, Natural(), Splits(), 7, gone)


def test_a_password_in_a_location_is_refused_and_not_repeated(source: Jsonl) -> None:
    for cache, rows in (("s3://me:secret@bucket/x", source), ("x", Jsonl(path="s3://me:secret@bucket/rows.jsonl"))):
        with pytest.raises(DataError, match="holds a password") as error:
            build(rows, Natural(), Splits(), 7, cache)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("location", "below"),
    [
        ("runs/stores", "runs/stores/a"),
        ("what?/stores", "what?/stores/a"),
        ("s3://bucket/", "s3://bucket/a"),
        ("s3://bucket/x?region=eu&scheme=http", "s3://bucket/x/a?region=eu&scheme=http"),
    ],
)
def test_options_of_a_uri_stay_its_end(location: str, below: str) -> None:
    assert within(location, "a") == below


def test_a_damaged_location_is_named(source: Jsonl, tmp_path: Path) -> None:
    cache = (tmp_path / "shared").as_uri()
    folder = build(source, Natural(), Splits(), 7, cache)
    shutil.rmtree(folder)
    rows = tmp_path / "shared" / folder.name / "rows.parquet"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"^{cache}/{folder.name} is damaged: delete it there, and it is made again$"):
        build(source, Natural(), Splits(), 7, cache)
    assert not folder.exists()


def test_a_copy_that_cannot_be_read_names_what_it_was_copied_from(source: Jsonl, tmp_path: Path) -> None:
    folder = build(source, Natural(), Splits(), 7, (tmp_path / "shared").as_uri())
    (folder / "index.arrow").write_bytes(b"x")
    way_out = rf"move or delete it, and {folder.name} in data\.cache, from which it may be copied; then"
    with pytest.raises(DataError, match=rf"^{folder} is damaged \(.*\): {way_out}"):
        Store.open(folder)


def test_nobody_else_reads_or_makes_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(tmp_path))
    assert node_cache().stat().st_mode & 0o777 == 0o700
    node_cache().rename(tmp_path / "theirs")
    (tmp_path / f"fedpost-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(DataError, match="belongs to another user: let TMPDIR name another folder"):
        node_cache()


def test_a_store_without_a_manifest_does_not_count(source: Jsonl, tmp_path: Path) -> None:
    cache = (tmp_path / "shared").as_uri()
    folder = build(source, Natural(), Splits(), 7, cache)
    (tmp_path / "shared" / folder.name / "manifest.json").unlink()
    assert not sealed.fetch(f"{cache}/{folder.name}", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    shutil.rmtree(folder)
    assert build(source, Natural(), Splits(), 7, cache) == folder
    assert (tmp_path / "shared" / folder.name / "manifest.json").exists()


def test_the_manifest_is_copied_last(source: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    copy = fs.copy_files

    def noted(origin: str, *rest: object) -> None:
        copied.append(Path(origin).name)
        copy(origin, *rest)

    monkeypatch.setattr(sealed.fs, "copy_files", noted)
    build(source, Natural(), Splits(), 7, (tmp_path / "shared").as_uri())
    assert copied[-1] == "manifest.json" and len(copied) == 3


def test_an_unknown_location_is_refused_in_one_sentence(source: Jsonl) -> None:
    with pytest.raises(DataError, match=r"nowhere://x is not a location that can be read"):
        build(source, Natural(), Splits(), 7, "nowhere://x")


def test_a_copy_that_was_found_here_is_published_where_it_is_missing(source: Jsonl, tmp_path: Path) -> None:
    folder = build(source, Natural(), Splits(), 7, (tmp_path / "first").as_uri())
    assert build(source, Natural(), Splits(), 7, (tmp_path / "second").as_uri()) == folder
    assert (tmp_path / "second" / folder.name / "manifest.json").exists()


def test_a_cache_that_cannot_be_written_is_named_and_tried_again(source: Jsonl, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in ((tmp_path / "file").as_uri(), str(tmp_path / "file" / "below")):
        for _ in range(2):
            with pytest.raises(DataError, match=r"data\.cache (cannot be written|is .*, but .* is a file)"):
                build(source, Natural(), Splits(), 7, cache)
