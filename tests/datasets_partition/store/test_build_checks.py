"""What a build refuses, leaves out and counts: the server's rows, duplicates, leaks, misfits, own code, old scratch."""

import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_partition.core.types import Assignment, DataError
from datasets_partition.core.types import Rows as Loaded
from datasets_partition.partitioners.natural import Natural
from datasets_partition.store.build import build
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import Store

NONE_HELD = Splits(heldout=0, unseen=0)


@dataclass(frozen=True)
class Rows:
    """A source made of (client, prompt, completion)."""

    rows: tuple[tuple[str, str, str], ...]

    def fingerprint(self) -> str:
        return ""

    def load(self) -> Loaded:
        columns = zip(("client", "prompt", "completion"), zip(*self.rows, strict=True), strict=True)
        return Loaded(pa.table({name: pa.array(values, pa.string()) for name, values in columns}), {})


def rows(**counts: int) -> Rows:
    return Rows(tuple((name, f"{name}{i}", "done") for name, count in counts.items() for i in range(count)))


def owned(store: Store) -> dict[str, tuple[list[str], list[str]]]:
    """Each client's prompts: (train, heldout)."""
    return {
        store.name(client): (
            store.read_rows(client, "train")["prompt"].to_pylist(),
            store.read_rows(client, "heldout")["prompt"].to_pylist(),
        )
        for client in range(store.num_clients)
    }


def test_the_servers_rows_are_nobody_elses(tmp_path: Path) -> None:
    store = Store.open(build(rows(a=10, b=10), Natural(), Splits(server=0.2, heldout=0, unseen=0), 7, str(tmp_path)))
    assert store.server == 2 == store.num_clients
    servers = store.read_rows(store.server, "heldout")
    assert servers["client"].to_pylist() == [None] * 4
    everybodys = [prompt for train, _ in owned(store).values() for prompt in train]
    assert sorted(everybodys + servers["prompt"].to_pylist()) == sorted(f"{c}{i}" for c in "ab" for i in range(10))
    assert store.manifest["rows"] == 16 and store.manifest["server_rows"] == 4


def test_rows_that_nobody_gets_are_left_out(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class OddOnes:
        def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
            clients = np.where(np.arange(table.num_rows) % 2, 0, -1).astype(np.int32)
            backwards = np.arange(table.num_rows)[::-1]
            return Assignment(clients, pa.array(["odd"]), table["completion"].combine_chunks(), backwards)

    folder = build(rows(a=6), OddOnes(), NONE_HELD, 7, str(tmp_path))
    assert owned(Store.open(folder)) == {"odd": (["a5", "a3", "a1"], [])}
    assert Store.open(folder).manifest["left_out_rows"] == Store.open(folder).manifest["unassigned_rows"] == 3
    assert pq.read_table(folder / "rows.parquet")["category"].to_pylist() == ["done"] * 3


def test_duplicates_may_be_kept_if_none_leaks(tmp_path: Path) -> None:
    twins = Rows(rows=(("a", "1", "x"), ("b", "1", "x"), ("a", "2", "x"), ("b", "3", "x")))

    def made(**splits: Any) -> Store:
        return Store.open(build(twins, Natural(), Splits(duplicates="keep", **splits), 7, str(tmp_path)))

    assert owned(made(heldout=0, unseen=0)) == {"a": (["1", "2"], []), "b": (["1", "3"], [])}
    with pytest.raises(DataError, match=r"1 held-out rows have the content of training rows, such as '1 \| x'"):
        made(heldout=0, unseen=0.5)
    assert made(heldout=0, unseen=0.5, leaks="allow").manifest["duplicate_rows"] == 0


def test_a_change_of_a_users_code_makes_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "own_rule.py"
    module.write_text(OWN_RULE.format(parts=2))
    monkeypatch.syspath_prepend(tmp_path)
    two = importlib.import_module("own_rule")
    first = build(rows(a=6), two.Mine(), NONE_HELD, 7, str(tmp_path))
    assert Store.open(first).num_clients == 2
    assert build(rows(a=6), two.Mine(), NONE_HELD, 7, str(tmp_path)) == first
    module.write_text(OWN_RULE.format(parts=3) + "# longer\n")
    second = build(rows(a=6), importlib.reload(two).Mine(), NONE_HELD, 7, str(tmp_path))
    assert second != first and Store.open(second).num_clients == 3


OWN_RULE = """
from dataclasses import dataclass
import numpy as np
import pyarrow as pa
from datasets_partition.core.types import Assignment

@dataclass(frozen=True)
class Mine:
    def assign(self, table, rng):
        clients = (np.arange(table.num_rows) % {parts}).astype(np.int32)
        return Assignment(clients, pa.array([str(i) for i in range({parts})]))
"""


@dataclass(frozen=True)
class Wrong:
    """A partitioner that gives whatever it holds."""

    given: Any

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Any:
        return self.given


@dataclass(frozen=True)
class WrongRows:
    """A source that gives whatever it holds."""

    given: Any

    def fingerprint(self) -> str:
        return ""

    def load(self) -> Any:
        return self.given


TURNS_WITHOUT_ROLE = pa.table({"messages": [[{"content": "a"}]]})
OTHER_FIELD = pa.table({"messages": [[{"role": "user", "content": "a", "thinking": "b"}]]})
NULL_CONTENT = pa.table({"messages": [[{"role": "user", "content": None}, {"role": "user", "content": "a"}]]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (pa.table({"text": ["a"]}), "must give Rows of an Arrow table and a dict, not Table"),
        (([], {}), "must give Rows of an Arrow table and a dict, not tuple"),
        (Loaded([{"text": "a"}], {}), "must give Rows of an Arrow table and a dict"),  # type: ignore[arg-type]
        (Loaded(pa.table({"text": ["a"]}), {}), "the columns text, which make no format"),
        (Loaded(pa.table({"prompt": ["a", "b"], "completion": ["c", None]}), {}), "gives 1 nulls in its completion"),
        (Loaded(pa.table({"prompt": ["a"], "completion": [1]}), {}), "gives int64 as its completion, which must hold"),
        (
            Loaded(OTHER_FIELD, {}),
            "gives turns with the field thinking, which nothing reads: put it into the field more",
        ),
        (Loaded(TURNS_WITHOUT_ROLE, {}), "as its messages, which must hold text or turns of role and content"),
        (Loaded(NULL_CONTENT, {}), "gives 1 nulls in its messages"),
    ],
)
def test_the_rows_of_a_users_source_are_checked(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        build(WrongRows(given), Natural(), NONE_HELD, 7, str(tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()


ONES = np.zeros(4, np.int32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (list(ONES), "must give an Assignment"),
        (Assignment(ONES, ["a"]), "whose names are an Arrow array"),  # type: ignore[arg-type]
        (Assignment(ONES[:3], pa.array(["a"])), "one integer for each of the 4 rows"),
        (Assignment(ONES + 0.5, pa.array(["a"])), "one integer for each of the 4 rows"),  # type: ignore[arg-type]
        (Assignment(ONES + 1, pa.array(["a"])), "names 1 clients, but gives rows to others"),
        (Assignment(ONES - 1, pa.array(["a"])), "gives no row to anybody"),
        (Assignment(ONES, pa.array(["a", "a"])), "two clients the same name"),
        (Assignment(ONES, pa.array(["a"]), None, np.arange(3)), "3 values of order for 4 rows"),
    ],
)
def test_the_assignment_of_a_users_partitioner_is_checked(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        build(rows(a=4), Wrong(given), NONE_HELD, 7, str(tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()


def test_a_server_that_takes_all_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.splits\.server is 0\.999, which leaves clients no row of 4"):
        build(rows(a=4), Natural(), Splits(server=0.999), 7, str(tmp_path))


def test_clients_who_are_gone_with_their_duplicates_are_counted(tmp_path: Path) -> None:
    twins = Rows(rows=(("a", "1", "x"), ("b", "1", "x"), ("c", "2", "x")))
    manifest = Store.open(build(twins, Natural(), NONE_HELD, 7, str(tmp_path))).manifest
    assert (manifest["duplicate_rows"], manifest["duplicate_clients"], manifest["clients"]) == (1, 1, 2)


def test_what_a_killed_writer_left_long_ago_goes(tmp_path: Path) -> None:
    folder = build(rows(a=4), Natural(), Splits(), 7, str(tmp_path))
    old, young = (tmp_path / f".{folder.name}-{name}" for name in ("old", "young"))
    old.mkdir(), young.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    build(rows(a=4), Natural(), Splits(), 7, str(tmp_path))
    assert young.exists() and not old.exists()
