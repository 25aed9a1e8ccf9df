import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_partition.core.types import DataError
from datasets_partition.core.types import Rows as Loaded
from datasets_partition.partitioners.by_size import Iid
from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.files import Jsonl
from datasets_partition.store import build as building
from datasets_partition.store.build import build
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import INDEX, Store

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT.parent / "shared" / "data"
NONE_HELD = Splits(heldout=0, unseen=0)

# Two builders that both have the rows before either writes: each waits until the other has loaded.
RACER = """
import sys, time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from datasets_partition.store.build import build
from datasets_partition.sources.files import Jsonl
from datasets_partition.partitioners.natural import Natural
from datasets_partition.store.splits import Splits

@dataclass(frozen=True, kw_only=True)
class Waiting(Jsonl):
    def load(self):
        table = super().load()
        Path(self.path + sys.argv[2]).touch()
        while not Path(self.path + sys.argv[3]).exists():
            time.sleep(0.001)
        return table

rows = Path(sys.argv[1])
print(build(Waiting(path=str(rows)), Natural(), Splits(), 1, str(rows.parent / "stores")))
"""


@dataclass(frozen=True, kw_only=True)
class Rows(Jsonl):
    """A source made of (client, prompt, completion)."""

    path: str = "nowhere"
    rows: tuple[tuple[str, str, str], ...]

    def fingerprint(self) -> str:
        return str(len(self.rows))

    def load(self) -> Loaded:
        client, prompt, completion = zip(*self.rows, strict=True) if self.rows else ((), (), ())
        columns = {"client": client, "prompt": prompt, "completion": completion}
        return Loaded(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), {})


def rows(**counts: int) -> Rows:
    return Rows(rows=tuple((name, f"{name}{i}", "done") for name, count in counts.items() for i in range(count)))


def owned(store: Store) -> dict[str, tuple[list[str], list[str]]]:
    """Each client's prompts: (train, heldout)."""
    return {
        store.name(client): (
            store.read_rows(client, "train")["prompt"].to_pylist(),
            store.read_rows(client, "heldout")["prompt"].to_pylist(),
        )
        for client in range(store.num_clients)
    }


def test_rows_are_sorted_by_client_in_the_order_of_the_source(tmp_path: Path) -> None:
    source = Rows(rows=(("b", "1", "x"), ("a", "2", "x"), ("b", "3", "x"), ("a", "4", "x"), ("c", "5", "x")))
    folder = build(source, Natural(), NONE_HELD, 7, str(tmp_path))
    store = Store.open(folder)
    assert owned(store) == {"a": (["2", "4"], []), "b": (["1", "3"], []), "c": (["5"], [])}
    assert pq.read_table(folder / "rows.parquet").to_pydict() == {
        "client": ["a", "a", "b", "b", "c"],
        "prompt": ["2", "4", "1", "3", "5"],
        "completion": ["x"] * 5,
    }
    assert store.read_rows(0, "train").schema.types == [pa.string()] * 3
    assert store.index.to_pydict() == {
        "name": ["a", "b", "c"],
        "start": [0, 2, 4],
        "train": [2, 2, 1],
        "heldout": [0, 0, 0],
    }
    assert store.index.schema == INDEX


def test_held_rows_follow_training_rows_and_the_manifest_counts_them(tmp_path: Path) -> None:
    source = rows(big=20, other=20, third=20, small=2)
    folder = build(source, Natural(), Splits(heldout=0.25, unseen=0.34, min_rows=3), 7, str(tmp_path))
    store = Store.open(folder)
    names = [store.name(client) for client in range(3)]
    assert sorted(names) == ["big", "other", "third"] and names[:2] == sorted(names[:2])
    assert (store.num_clients, store.num_training) == (3, 2)
    for client, name in enumerate(names):
        train, heldout = owned(store)[name]
        assert (len(train), len(heldout)) == ((0, 20) if client >= store.num_training else (15, 5))
        assert sorted(train + heldout) == sorted(f"{name}{i}" for i in range(20))
        for part in (train, heldout):
            assert part == sorted(part, key=lambda prompt: int(prompt.removeprefix(name)))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == store.manifest
    assert folder.name == manifest.pop("key")[:16]
    assert manifest.pop("own_code") and manifest.pop("digest")  # the code is this file's, which holds the source
    assert manifest == {
        "source": repr(source),
        "fingerprint": "62",
        "reading": 2,
        "partitioner": "Natural(kind='natural', key='client')",
        "splits": repr(Splits(heldout=0.25, unseen=0.34, min_rows=3)),
        "seed": 7,
        "store_version": 5,
        "label": None,
        "bytes": {name: (folder / name).stat().st_size for name in ("index.arrow", "rows.parquet")},
        "fedpost": version("fedpost"),
        "rows": 60,
        "clients": 3,
        "unseen_clients": 1,
        "server_rows": 0,
        "skipped_rows": {},
        "duplicate_rows": 0,
        "duplicate_clients": 0,
        "left_out_clients": 1,
        "left_out_rows": 2,
        "unassigned_rows": 0,
    }


def test_the_first_of_equal_rows_stays_and_a_key_outside_the_content_still_partitions(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [("p", "q", "x"), ("p", "q", "y"), ("p", "r", "y"), ("", "pq", "x"), ("p", "q", "x")]
    keys = ("prompt", "completion", "row")  # "row": no column's name is taken
    path.write_text("".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines))
    store = Store.open(build(Jsonl(path=str(path)), Natural(key="row"), NONE_HELD, 7, str(tmp_path)))
    assert store.manifest["duplicate_rows"] == 2
    assert owned(store) == {"x": (["p", ""], []), "y": (["p"], [])}
    assert store.read_rows(1, "train").to_pylist() == [{"client": "y", "prompt": "p", "completion": "r"}]


def test_what_is_drawn_is_the_same_on_every_machine(tmp_path: Path) -> None:
    # Seen once and written down: it changes with the way rows are drawn, and STORE_VERSION with it.
    store = Store.open(build(rows(a=6, b=6), Iid(clients=3), Splits(heldout=0.25, unseen=0.3), 7, str(tmp_path)))
    assert owned(store) == {
        "0": ([], ["a0", "a1", "a4", "b1"]),
        "1": (["a2", "a3", "b2"], ["b0"]),
        "2": (["a5", "b4", "b5"], ["b3"]),
    }


def test_a_store_is_reused_and_anything_else_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(source: Rows = rows(a=4), key: str = "client", heldout: float = 0.1, seed: int = 7) -> Path:  # noqa: B008
        return build(source, Natural(key=key), Splits(heldout=heldout), seed, str(tmp_path))

    first = made()
    assert first.parent == tmp_path
    before = (first / "rows.parquet").stat().st_mtime_ns
    assert made() == first and (first / "rows.parquet").stat().st_mtime_ns == before
    monkeypatch.setattr(Rows, "fingerprint", lambda self: "changed")
    others = {first, made(), made(rows(a=5)), made(key="prompt"), made(heldout=0.2), made(seed=8)}
    monkeypatch.setattr(building, "STORE_VERSION", 1)
    assert len(others | {made()}) == 7
    assert {folder.name for folder in tmp_path.iterdir()} == {folder.name for folder in others} | {made().name}


def test_something_else_in_the_place_of_a_store_is_an_error(tmp_path: Path) -> None:
    folder = build(rows(a=4), Natural(), Splits(), 7, str(tmp_path))
    for damage in ('{"key', "{}"):
        (folder / "manifest.json").write_text(damage)
        with pytest.raises(DataError, match="or is damaged: move or delete it"):
            build(rows(a=4), Natural(), Splits(), 7, str(tmp_path))
    with pytest.raises(DataError, match="is not what belongs there, or is damaged: move or delete it, and"):
        build(rows(a=4), Natural(), Splits(), 7, str(tmp_path))


@pytest.mark.parametrize("name", ["rows.parquet", "index.arrow"])
def test_a_store_with_a_truncated_file_is_an_error(tmp_path: Path, name: str) -> None:
    folder = build(rows(a=4), Natural(), Splits(), 7, str(tmp_path))
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(DataError, match="or is damaged: move or delete it"):
        build(rows(a=4), Natural(), Splits(), 7, str(tmp_path))


def test_a_label_is_the_category_of_any_partition(tmp_path: Path) -> None:
    source = rows(a=6, b=6)
    folders = {
        label: build(source, Iid(clients=3), Splits(server=0.25), 7, str(tmp_path), label=label)
        for label in (None, "client")
    }
    assert len(set(folders.values())) == 2
    assert "category" not in Store.open(folders[None]).read_rows(0, "train").column_names
    store = Store.open(folders["client"])
    for client in (*range(store.num_clients), store.server):
        for split in ("train", "heldout"):
            part = store.read_rows(client, split)
            assert part["category"].to_pylist() == [prompt[0] for prompt in part["prompt"].to_pylist()]


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    said = r"^data\.label names 'color', which the rows do not have: name one of .*client.*, or leave it out$"
    with pytest.raises(DataError, match=said):
        build(rows(a=4), Natural(), Splits(), 7, str(tmp_path), label="color")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="the source gives no rows"):
        build(Rows(rows=()), Natural(), Splits(), 7, str(tmp_path / "stores"))
    with pytest.raises(DataError, match="more than 4 rows"):
        build(rows(a=4), Natural(), Splits(min_rows=5), 7, str(tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()

    def full(self: pq.ParquetWriter, table: pa.Table, row_group_size: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="no space left"):
        build(rows(a=4), Natural(), Splits(), 7, str(tmp_path / "stores"))
    assert list((tmp_path / "stores").iterdir()) == []


def test_two_processes_build_the_same_store_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"client": i % 3, "text": str(i)}) + "\n" for i in range(60)))
    program = tmp_path / "racer.py"
    program.write_text(RACER)
    racers = [
        subprocess.Popen(
            [sys.executable, program, str(path), *order],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in ((".one", ".two"), (".two", ".one"))
    ]
    deadline = time.monotonic() + 60
    try:
        said = [racer.communicate(timeout=deadline - time.monotonic())[0].strip() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    assert [racer.returncode for racer in racers] == [0, 0]
    assert said[0] == said[1]
    assert [str(folder) for folder in (tmp_path / "stores").iterdir()] == said[:1]
    assert Store.open(Path(said[0])).manifest["rows"] == 60


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    splits=st.builds(Splits, heldout=st.floats(0, 0.9), unseen=st.floats(0, 0.9), min_rows=st.integers(1, 3)),
    seed=st.integers(0, 9),
)
def test_every_row_is_used_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], splits: Splits, seed: int
) -> None:
    counts[0] += 2
    source = rows(**{f"c{i}": count for i, count in enumerate(counts)})
    store = Store.open(build(source, Natural(), splits, seed, str(tmp_path_factory.mktemp("stores"))))
    expected = {f"c{i}": count for i, count in enumerate(counts) if count >= splits.min_rows}
    rows_by_client = owned(store)
    assert {name: sorted(train + heldout) for name, (train, heldout) in rows_by_client.items()} == {
        name: sorted(f"{name}{i}" for i in range(count)) for name, count in expected.items()
    }
    assert [len(train) for train, _ in rows_by_client.values()] == store.counts("train").tolist()
    assert store.manifest["rows"] + store.manifest["left_out_rows"] == sum(counts)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_real_rows(tmp_path: Path) -> None:
    store = Store.open(
        build(Jsonl(path=str(DATA / "tldr_en.jsonl.gz")), Natural(), Splits(min_rows=5), 7, str(tmp_path))
    )
    manifest = store.manifest
    assert manifest["rows"] + manifest["left_out_rows"] + manifest["duplicate_rows"] == 32_136
    assert manifest["clients"] == store.num_clients == len(set(store.index["name"].to_pylist()))
    assert store.num_clients - store.num_training == round(store.num_clients * 0.1)
    table = pq.read_table(store.folder / "rows.parquet").to_pydict()
    assert len(set(zip(table["prompt"], table["completion"], strict=True))) == manifest["rows"]
    for client in map(int, np.argsort(store.counts("train"))[[0, -1]]):
        read = store.read_rows(client, "train")
        assert read.num_rows == store.counts("train")[client]
        assert set(read["client"].to_pylist()) <= {store.name(client)}


@dataclass(frozen=True)
class Questions:
    """Prompts with answers and other columns."""

    def fingerprint(self) -> str:
        return "1"

    def load(self) -> Loaded:
        columns = {"client": ["b", "a", "a"], "prompt": ["1", "2", "3"], "answer": ["x", "y", "z"], "level": [1, 2, 3]}
        return Loaded(pa.table(columns), {})


def test_columns_beside_the_content_are_kept_if_they_are_asked_for(tmp_path: Path) -> None:
    def stored(**options: Any) -> tuple[str, dict[str, list[Any]]]:
        folder = build(Questions(), Natural(), NONE_HELD, 7, str(tmp_path), **options)
        return folder.name, Store.open(folder).read_rows(0, "train").to_pydict()

    plain, answers, everything = stored(), stored(beside=("answer",)), stored(beside=None)
    assert plain == stored(beside=()) and plain[1] == {"client": ["a", "a"], "prompt": ["2", "3"]}
    assert answers[1] == {**plain[1], "answer": ["y", "z"]}
    assert everything[1] == {**answers[1], "level": [2, 3]}
    assert len({plain[0], answers[0], everything[0]}) == 3
    assert stored(beside=("prompt", "client"))[1] == plain[1]
    with pytest.raises(DataError, match=r"train.objective reads the column 'missing', which the source does not give"):
        stored(beside=("missing",))
