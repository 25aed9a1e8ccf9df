import ctypes
import multiprocessing
import os
import pickle
import shutil
import sys
import time
from mmap import MADV_DONTNEED, MADV_RANDOM, PAGESIZE
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.files import Jsonl
from datasets_partition.store import tokens as tokenizing
from datasets_partition.store.build import build
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import SplitName, Store
from datasets_partition.store.tokens import Tokens, tokenize

SPLITS: tuple[SplitName, ...] = ("train", "heldout")


def encode(rows: pa.Table) -> pa.Table:
    """A row's tokens are its completion's bytes; a row that starts with "-" is dropped."""
    ids = [None if text.startswith("-") else list(text.encode()) for text in rows["completion"].to_pylist()]
    mask = [[1] * len(row or ()) for row in ids]
    return pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32())), "mask": pa.array(mask, pa.list_(pa.int8()))})


def stored(folder: Path, texts: dict[str, list[str]], splits: Splits) -> Store:
    path = folder / "rows.csv"
    lines = [f'{{"client": "{name}", "text": "{text}"}}\n' for name, mine in texts.items() for text in mine]
    path.write_text("".join(lines))
    return Store.open(build(Jsonl(path=str(path)), Natural(), splits, 7, str(folder / "stores")))


def test_columns_in_a_shared_location_are_made_once(tmp_path: Path) -> None:
    store = stored(tmp_path, {"a": ["a1", "-2", "a3"], "b": ["b1"]}, Splits(heldout=0, unseen=0))
    shared = (tmp_path / "shared").as_uri()
    first = tokenize(store, "bytes", encode, shared)
    files = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "shared" / first.folder.name).iterdir()} == files

    shutil.rmtree(first.folder)
    again = tokenize(store, "bytes", lambda rows: pytest.fail("made again"), shared)
    assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == files

    # What a killed copy left there does not count: the manifest comes last.
    shutil.rmtree(first.folder)
    (tmp_path / "shared" / first.folder.name / "manifest.json").unlink()
    tokenize(store, "bytes", encode, shared)
    assert {p.name: p.read_bytes() for p in (tmp_path / "shared" / first.folder.name).iterdir()} == files


@pytest.mark.parametrize("name", ["index.arrow", "tokens.arrow", "manifest.json"])
@pytest.mark.parametrize("left", [None, 0, 99])
def test_damaged_columns_are_named(tmp_path: Path, name: str, left: int | None) -> None:
    store = stored(tmp_path, {"a": ["a1", "a2"]}, Splits())
    folder = tokenize(store, "bytes", encode).folder
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if left is not None:
        (folder / name).write_bytes(whole[:left])
    with pytest.raises(DataError, match=rf"^{folder} is not what belongs there, or is damaged: move or"):
        tokenize(store, "bytes", encode)
    if name != "manifest.json":
        with pytest.raises(DataError, match=rf"^{folder} is damaged \(.+\): move or delete it; then it is"):
            Tokens.open(folder)


def test_what_a_killed_writer_left_long_ago_goes(tmp_path: Path) -> None:
    store = stored(tmp_path, {"a": ["a1", "a2"]}, Splits())
    old = store.folder / f".{tokenize(store, 'bytes', encode).folder.name}-old"
    old.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    tokenize(store, "bytes", encode)
    assert not old.exists()


def test_dropped_rows_are_counted_by_client_and_split(tmp_path: Path) -> None:
    texts = {"a": ["a1", "-2", "a3"], "b": ["-4", "-5"], "c": ["c6"]}
    store = stored(tmp_path, texts, Splits(heldout=0, unseen=0))
    tokens = tokenize(store, "bytes", encode)
    assert tokens.counts("train").tolist() == [2, 0, 1]
    assert tokens.dropped("train").tolist() == [1, 2, 0]
    assert tokens.counts("heldout").tolist() == tokens.dropped("heldout").tolist() == [0, 0, 0]
    assert tokens.lengths().tolist() == [4, 0, 2]
    assert tokens.empty_clients() == ["b"]
    assert tokens.rows(0, "train").to_pydict() == {"input_ids": [[97, 49], [97, 51]], "mask": [[1, 1], [1, 1]]}
    assert tokens.rows(1, "train").to_pydict() == {"input_ids": [], "mask": []}
    assert tokens.rows(2, "train").to_pydict() == {"input_ids": [[99, 54]], "mask": [[1, 1]]}
    assert {"name", "batch", "start", *SPLITS, "dropped_train", "dropped_heldout", "tokens"} == set(
        tokens.index.column_names
    )


@pytest.mark.parametrize("window", [1, 2, 7, 4096])
def test_every_client_has_its_rows_in_any_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(tokenizing, "ROWS_PER_BATCH", window)
    texts = {f"c{i}": [f"{'-' * ((i + j) % 3 == 0)}{i}.{j}" for j in range(1 + 5 * i % 11)] for i in range(9)}
    texts["d"] = ["-only", "-dropped"]
    store = stored(tmp_path, texts, Splits(heldout=0.3, unseen=0.2))
    sizes = []

    def counted(rows: pa.Table) -> pa.Table:
        sizes.append(rows.num_rows)
        return encode(rows)

    reported: list[int] = []
    tokens = tokenize(store, "bytes", counted, on_rows=reported.append)
    assert reported == sorted(reported) and reported[-1] == store.manifest["rows"]
    assert max(sizes) <= window and sum(sizes) == store.manifest["rows"]
    for client in range(store.num_clients):
        for split in SPLITS:
            kept = encode(store.read_rows(client, split)).drop_null()
            assert tokens.rows(client, split).to_pydict() == kept.to_pydict()
            assert tokens.counts(split)[client] == kept.num_rows
    for split in SPLITS:
        both = np.add(tokens.counts(split), tokens.dropped(split))
        assert both.dtype == np.int32 and both.tolist() == store.counts(split).tolist()
    emptied = np.flatnonzero(tokens.counts("train")[: store.num_training] == 0)
    assert tokens.empty_clients() == [store.name(client) for client in emptied.tolist()]


def test_a_population_whose_rows_are_all_dropped(tmp_path: Path) -> None:
    tokens = tokenize(stored(tmp_path, {"a": ["-1"], "b": ["-2"]}, Splits(heldout=0, unseen=0)), "bytes", encode)
    assert tokens.empty_clients() == ["a", "b"]
    assert tokens.rows(1, "train").num_rows == 0


def test_rows_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    store = stored(tmp_path, {"a": ["long " * 99 + str(i) for i in range(500)], "b": ["x"]}, Splits())
    tokens = tokenize(store, "bytes", encode)
    before = pa.total_allocated_bytes()
    views = [tokens.rows(0, "train") for _ in range(100)]
    assert pa.total_allocated_bytes() - before < 10_000
    first, second = (view["input_ids"].values.buffers()[1].address for view in views[:2])
    assert first == second


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
def test_the_next_clients_rows_are_read_while_one_is_worked_on(tmp_path: Path) -> None:
    store = stored(tmp_path, {name: [name * 200_000] for name in "abc"}, Splits(heldout=0, unseen=0))
    tokens = tokenize(store, "bytes", encode)
    file = tokens.pages[1]
    ids = [tokens.rows(client, "train")["input_ids"].flatten() for client in range(3)]

    def in_memory(client: int) -> float:
        """The share of a client's pages that are in memory, not counting the first and the last."""
        first = ids[client].buffers()[1].address + 4 * ids[client].offset
        start = -(-first // PAGESIZE) * PAGESIZE
        pages = (first + 4 * len(ids[client]) - start) // PAGESIZE
        resident = (ctypes.c_ubyte * pages)()
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGESIZE), resident)
        return sum(page & 1 for page in resident) / pages

    def forget() -> None:
        file.madvise(MADV_DONTNEED)
        with (tokens.folder / "tokens.arrow").open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    file.madvise(MADV_RANDOM)  # the system would read the whole of such a small file
    forget()
    if in_memory(1) > 0.5:
        pytest.skip("this file system keeps all in memory")
    chunk = tokens.in_advance([(0,), (1,), (2,)])
    assert next(chunk) == (0,)
    deadline = time.monotonic() + 10
    while in_memory(1) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_memory(1) == 1 and in_memory(2) < 0.5
    assert list(chunk) == [(1,), (2,)]


def test_they_are_made_once_for_a_key_and_travel_as_their_path(tmp_path: Path) -> None:
    store = stored(tmp_path, {"a": ["a1", "a2"], "b": ["b"]}, Splits(heldout=0, unseen=0))
    tokens = tokenize(store, "bytes", encode)

    def refuse(rows: pa.Table) -> pa.Table:
        raise AssertionError("made twice")

    assert tokenize(store, "bytes", refuse).folder == tokens.folder
    assert tokens.folder.parent == store.folder
    with pytest.raises(AssertionError, match="made twice"):
        tokenize(store, "other", refuse)
    assert [path for path in store.folder.iterdir() if path.is_dir()] == [tokens.folder]
    assert tokenize(store, "other", encode).folder != tokens.folder
    sent = pickle.dumps(tokens)
    assert len(sent) < 500
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(Tokens.rows, (tokens, 1, "train")).to_pydict() == tokens.rows(1, "train").to_pydict()


@pytest.mark.parametrize("wrong", [lambda rows: encode(rows).slice(1), lambda rows: encode(rows).select(["mask"])])
def test_an_objective_that_loses_rows_or_their_tokens_is_an_error(tmp_path: Path, wrong) -> None:  # type: ignore[no-untyped-def]
    store = stored(tmp_path, {"a": ["a1", "a2"]}, Splits())
    with pytest.raises(ValueError, match="must give a row for each, with input_ids, null where the row is dropped"):
        tokenize(store, "bytes", wrong)


@pytest.mark.parametrize("at_once", [4096, 2])
def test_rows_are_regrouped_within_a_clients_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Blocks of three bytes, never over a border of clients or splits, in whatever windows the store is read."""
    monkeypatch.setattr(tokenizing, "ROWS_PER_BATCH", at_once)

    def blocks(rows: pa.Table) -> pa.Table:
        ids = [byte for row in rows["input_ids"].to_pylist() for byte in row]
        cut = [ids[first : first + 3] for first in range(0, len(ids), 3)]
        return pa.table({"input_ids": pa.array(cut, pa.list_(pa.int32()))})

    texts = {"a": ["aaaa", "-", "bb"], "b": ["c"], "d": ["dd", "ee", "ffff", "g"]}
    store = stored(tmp_path, texts, Splits(heldout=0.25, unseen=0, draw="last"))
    tokens = tokenize(store, "blocks", lambda rows: encode(rows).select(["input_ids"]), regroup=blocks)
    plain = tokenize(store, "plain", encode)
    for split in SPLITS:
        for client in range(3):
            text = b"".join(bytes(ids) for ids in plain.rows(client, split)["input_ids"].to_pylist())
            mine = [bytes(ids) for ids in tokens.rows(client, split)["input_ids"].to_pylist()]
            assert mine == [text[first : first + 3] for first in range(0, len(text), 3)]
            assert tokens.counts(split)[client] == len(mine)
        assert tokens.dropped(split).tolist() == plain.dropped(split).tolist()
    assert tokens.lengths().tolist() == plain.lengths().tolist()


def test_all_columns_of_tokens_count(tmp_path: Path) -> None:
    store = stored(tmp_path, {"a": ["aaaa", "bb"], "b": ["c"]}, Splits(heldout=0, unseen=0))

    def both(rows: pa.Table) -> pa.Table:
        once = encode(rows)
        return once.append_column("rejected_ids", pa.array([[1, 2]] * rows.num_rows, pa.list_(pa.int32())))

    assert tokenize(store, "both", both).lengths().tolist() == [4 + 2 + 2 * 2, 1 + 2]
