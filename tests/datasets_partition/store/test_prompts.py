"""Splits by prompt: no prompt on two sides, none at two clients unless natural keys say so, and every row is used."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_partition.core.dealing import together
from datasets_partition.core.types import Assignment, DataError, Partitioner
from datasets_partition.partitioners.by_label import Dirichlet, Distribution, InnerDirichlet, Pathological, Shards
from datasets_partition.partitioners.by_size import BySize, Iid, SizeCap
from datasets_partition.partitioners.by_topic import ByTopic
from datasets_partition.partitioners.combined import Combined
from datasets_partition.partitioners.continuous import ByLength, Continuous
from datasets_partition.partitioners.natural import ByTime, GroupedNatural, Natural
from datasets_partition.sources.files import Jsonl
from datasets_partition.store.build import build
from datasets_partition.store.contents import prompt_numbers
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import Store

PROMPTS = [prompt for prompt in range(80) for _ in range(1 + prompt % 5)]  # of each row: 1 to 5 rows have the same
ROWS = len(PROMPTS)
WORDS = ("list", "set", "file", "socket", "thread")


def line(row: int) -> dict[str, Any]:
    """A row, which one of 12 clients has; the label follows from the prompt."""
    prompt = PROMPTS[row]
    return {
        "client": f"c{row * 7 % 12:02d}",
        "prompt": f"open a {WORDS[prompt % 5]} {prompt}",
        "completion": f"answer {row}",
        "label": "abc"[prompt % 3],
        "number": prompt % 37,
        "time": row * 31 % ROWS,
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> Jsonl:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(path=str(path))


def made(folder: Path, partitioner: Partitioner, rows: list[dict[str, Any]] | None = None, **splits: Any) -> Store:
    given = {"heldout": 0.2, "unseen": 0.2, "by": "prompt"} | splits
    source = write(folder, [line(row) for row in range(ROWS)] if rows is None else rows)
    return Store.open(build(source, partitioner, Splits(**given), 7, str(folder)))


def parts(store: Store) -> Iterator[tuple[int, str, list[str], list[str]]]:
    """The client, side, prompts and completions of each part of a store; the server's client is its last."""
    for client in range(store.index.num_rows):
        side = "server" if client == store.server else "unseen" if client >= store.num_training else ""
        for split in ("train", "heldout"):
            table = store.read_rows(client, split)  # type: ignore[arg-type]
            yield client, side or split, table["prompt"].to_pylist(), table["completion"].to_pylist()


def sides(store: Store) -> dict[str, set[str]]:
    """The sides on which each prompt has rows."""
    by_prompt: dict[str, set[str]] = {}
    for _, side, prompts, _ in parts(store):
        for prompt in prompts:
            by_prompt.setdefault(prompt, set()).add(side)
    return by_prompt


def holders(store: Store) -> dict[str, set[int]]:
    """The clients that have rows of each prompt."""
    by_prompt: dict[str, set[int]] = {}
    for client, _, prompts, _ in parts(store):
        for prompt in prompts:
            by_prompt.setdefault(prompt, set()).add(client)
    return by_prompt


DRAWING = [
    Iid(clients=6),
    BySize(clients=5, law="linear"),
    BySize(clients=8, law="lognormal"),
    BySize(sizes=(60, 10, 100)),
    SizeCap(rows=40),
    SizeCap(rows=100, surplus="drop"),
    Dirichlet(label="label", clients=6),
    Dirichlet(label="label", clients=20, alpha=0.1, min_rows=0),
    InnerDirichlet(label="label", clients=6),
    InnerDirichlet(label="label", sizes=(100, 20, 50)),
    Shards(label="label", clients=6, shards=2),
    Shards(label="label", clients=4, shard_rows=17, keep_rest=True),
    Pathological(label="label", clients=6),
    Distribution(label="label", shares={"a": (1, 0, 2), "b": (0, 1, 0), "c": (1, 1, 1)}),
    Continuous(column="number", clients=6),
    ByLength(clients=6, strictness=0.5),
    ByTopic(clients=4, topics=3, columns=("prompt",), alpha=1.0),
    Combined(first=Dirichlet(label="label", clients=3, alpha=10.0), then=SizeCap(rows=30)),
    Combined(first=SizeCap(rows=200, surplus="drop"), then=Shards(label="label", clients=4, shards=2)),
]


@pytest.mark.parametrize("partitioner", DRAWING, ids=repr)
def test_a_partition_that_draws_gives_a_prompt_to_one_client_and_one_side(
    partitioner: Partitioner, tmp_path: Path
) -> None:
    store = made(tmp_path, partitioner, server=0.1)
    assert all(len(on) == 1 for on in sides(store).values())
    assert all(len(clients) == 1 for clients in holders(store).values())
    completions = [text for *_, answers in parts(store) for text in answers]
    left_out = store.manifest["left_out_rows"]
    assert left_out == store.manifest["unassigned_rows"]
    assert len(set(completions)) == len(completions) == ROWS - left_out
    assert store.manifest["prompts"] == len(sides(store))
    assert (store.counts("train")[: store.num_training] > 0).all()
    people = {name.split("/")[0] for name in store.names(list(range(store.num_clients)))}
    assert store.num_training < store.num_clients or len(people) == 1
    for client, _, prompts, answers in parts(store):  # whole rows, not prompts beside others' completions
        assert prompts == [line(int(text.split()[1]))["prompt"] for text in answers], client
    # A tenth of the rows is the server's, to half a prompt.
    assert abs(store.manifest["server_rows"] - 24) <= 2


def test_sizes_are_those_of_rows_to_less_than_a_prompt(tmp_path: Path) -> None:
    store = made(tmp_path, BySize(sizes=(60, 10, 100)), unseen=0)
    sizes = dict(zip(store.index["name"].to_pylist(), store.counts("train") + store.counts("heldout"), strict=True))
    assert all(abs(sizes[name] - size) <= 5 for name, size in (("0", 60), ("1", 10), ("2", 100)))
    assert store.manifest["unassigned_rows"] == ROWS - 170


def test_a_label_stays_with_its_clients(tmp_path: Path) -> None:
    """Labels follow from prompts here, so that shares of labels hold as they do by row."""
    shares = {"a": (1.0, 0.0, 2.0), "b": (0.0, 1.0, 0.0), "c": (1.0, 1.0, 1.0)}
    store = made(tmp_path, Distribution(label="label", shares=shares), unseen=0)
    for client in range(3):
        rows = pa.concat_tables(store.read_rows(client, split) for split in ("train", "heldout"))
        labels = {line(int(text.split()[1]))["label"] for text in rows["completion"].to_pylist()}
        assert labels == {label for label, each in shares.items() if each[client]}
        assert set(rows["category"].to_pylist()) == labels


NATURAL = [
    Natural(),
    GroupedNatural(keys=3),
    GroupedNatural(max_rows=7),
    ByTime(time="time"),
    Combined(first=Natural(), then=SizeCap(rows=7)),
    Combined(first=Natural(), then=Natural(key="label")),
    Combined(first=Iid(clients=2), then=Natural()),
    Combined(first=ByTime(time="time"), then=Dirichlet(label="label", clients=2, min_rows=0)),
]


@pytest.mark.parametrize("partitioner", NATURAL, ids=repr)
def test_a_natural_key_keeps_its_clients_and_they_hold_the_same_prompts_out(
    partitioner: Partitioner, tmp_path: Path
) -> None:
    store = made(tmp_path, partitioner, unseen=0, server=0.1)
    assert all(len(on) == 1 for on in sides(store).values())
    assert (store.counts("train")[: store.num_clients] > 0).all() and store.counts("heldout").any()
    owners: dict[int, set[str]] = {}
    shared: dict[tuple[str, str], set[int]] = {}
    for client, side, prompts, answers in parts(store):
        for prompt, text in zip(prompts, answers, strict=True):
            person = line(int(text.split()[1]))["client"]
            if side != "server":
                owners.setdefault(client, set()).add(person)
                shared.setdefault((prompt, person), set()).add(client)
    assert all(len(people) <= (3 if partitioner == GroupedNatural(keys=3) else 1) for people in owners.values())
    assert all(len(clients) == 1 for clients in shared.values())
    completions = [text for *_, answers in parts(store) for text in answers]
    assert sorted(completions) == sorted(f"answer {row}" for row in range(ROWS))


@pytest.mark.parametrize("partitioner", [Natural(), Combined(first=Natural(), then=SizeCap(rows=7))], ids=repr)
def test_a_prompt_of_training_and_unseen_clients_is_a_leak(partitioner: Partitioner, tmp_path: Path) -> None:
    said = (
        r"^\d+ rows of unseen clients have the prompt of training rows, such as 'open a \w+ \d+': set "
        r'data\.splits\.unseen = 0, take a partition that draws, such as kind = "iid", or accept the leak by '
        r'data\.splits\.leaks = "allow"$'
    )
    with pytest.raises(DataError, match=said):
        made(tmp_path, partitioner)
    each = sides(made(tmp_path, partitioner, leaks="allow")).values()
    assert {"train", "unseen"} in each and not any({"train", "heldout"} <= on for on in each)


def test_without_a_shared_prompt_there_is_no_leak(tmp_path: Path) -> None:
    rows = [{"client": f"c{n % 6}", "prompt": f"p{n % 30}", "completion": f"{n}"} for n in range(90)]
    store = made(tmp_path, Natural(), rows)
    assert all(len(on) == 1 for on in sides(store).values())
    # Five prompts of three rows each: a fifth is a prompt, and a fifth of six clients is one.
    assert store.counts("heldout").tolist() == [3, 3, 3, 3, 3, 15]


def test_the_last_prompts_are_held_out_where_the_recipe_says_so(tmp_path: Path) -> None:
    prompts = ("p", "q", "r", "s", "q", "t", "p", "u", "u", "v")
    rows = [{"client": "a", "prompt": prompt, "completion": f"{n}"} for n, prompt in enumerate(prompts)]
    store = made(tmp_path, Natural(), rows, heldout=0.3, unseen=0, draw="last")
    assert store.read_rows(0, "heldout")["prompt"].to_pylist() == ["u", "u", "v"]
    # The fourth row is one of p's, the last of which comes after t's.
    store = made(tmp_path, Natural(), rows, heldout=0.5, unseen=0, draw="last")
    assert store.read_rows(0, "heldout")["prompt"].to_pylist() == ["p", "p", "u", "u", "v"]


def test_a_client_with_a_single_prompt_trains_on_it(tmp_path: Path) -> None:
    rows = [{"client": "a", "prompt": "p", "completion": f"{n}"} for n in range(5)]
    rows += [{"client": "b", "prompt": "pq"[n % 2], "completion": f"b{n}"} for n in range(10)]
    store = made(tmp_path, Natural(), rows, heldout=0.9, unseen=0)
    assert store.counts("train").tolist() == [5, 5] and store.counts("heldout").tolist() == [0, 5]


def test_rows_without_a_prompt_are_dealt_one_by_one(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}"} for n in range(40)]
    by_row = made(tmp_path, Iid(clients=4), rows, by="row", server=0.1)
    by_prompt = made(tmp_path, Iid(clients=4), rows, server=0.1)
    assert by_prompt.index.to_pydict() == by_row.index.to_pydict()
    assert holders(by_prompt) == {"": set(range(5))}


def test_clients_that_get_no_prompt_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"{n}"} for n in range(8)]
    store = made(tmp_path, Iid(clients=4), rows, unseen=0)
    assert (store.num_clients, store.manifest["left_out_clients"], store.counts("train").tolist()) == (1, 0, [8])


def test_a_cap_that_whole_prompts_exceed_is_not_claimed(tmp_path: Path) -> None:
    rows = [{"client": "a", "prompt": f"{n // 5}", "completion": f"{n}"} for n in range(15)]
    capped = Combined(first=Natural(), then=SizeCap(rows=4))
    assert made(tmp_path, capped, rows, unseen=0).manifest["unit"].startswith("a part of at most 5 rows of one value")
    assert made(tmp_path, capped, rows, unseen=0, by="row").manifest["unit"].startswith("a part of at most 4 rows")


@dataclass(frozen=True)
class Turns:
    """A partitioner of a user's own: nobody knows whether it draws."""

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        return Assignment((np.arange(table.num_rows) % 2).astype(np.int32), pa.array(["even", "odd"]))


def test_a_users_partition_keeps_its_clients(tmp_path: Path) -> None:
    store = made(tmp_path, Turns(), unseen=0)
    assert {len(clients) for clients in holders(store).values()} == {1, 2}
    assert all(len(on) == 1 for on in sides(store).values())
    with pytest.raises(DataError, match="rows of unseen clients have the prompt of training rows"):
        made(tmp_path, Turns(), unseen=0.5)


def test_stores_are_the_same_on_any_machine_and_by_row_those_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"client": f"c{n % 5}", "prompt": f"p{n % 7}", "completion": f"{n}", "topic": f"t{n % 3}"} for n in range(60)
    ]
    write(tmp_path, rows)
    partitioner = Combined(first=Natural(), then=SizeCap(rows=5))
    splits = {"heldout": 0.25, "unseen": 0.3, "server": 0.1}
    folders = {
        by: build(Jsonl(path="rows.jsonl"), partitioner, Splits(**splits, by=by, leaks="allow"), 7, "stores")  # type: ignore[arg-type]
        for by in ("row", "prompt")
    }
    digests = {}
    for by, folder in folders.items():
        stored = [pq.read_table(folder / "rows.parquet").to_pydict(), Store.open(folder).index.to_pydict()]
        digests[by] = sha256(json.dumps(stored).encode()).hexdigest()[:16]
    # Seen once and written down; the name and the digest by row before there was a choice.
    assert folders["row"].name == "0410d5a105ecafbe"
    assert digests == {"row": "5f5f8674ae5f48d5", "prompt": "7134fcbcd64be054"}
    row, prompt = (Store.open(folder).manifest for folder in folders.values())
    assert "by" not in row and prompt["by"] == "prompt" and row["splits"] == prompt["splits"]
    assert folders["row"] != folders["prompt"]


def talk(*turns: str, **more: Any) -> list[dict[str, Any]]:
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[1:]} | more for turn in turns]


def test_the_prompt_of_a_row() -> None:
    texts = pa.table({"prompt": ["a", "b", "", "a", "", "A"], "completion": list("uvwxyz")})
    assert prompt_numbers(texts).tolist() == [0, 1, 4, 0, 5, 3]  # 2 was the empty prompt's
    talks = [
        talk("ux", "ay"),
        talk("ux", "az", "ub"),  # the rest is no prompt
        talk("ux", "ay", "uz", "ab"),
        talk("sp", "ux", "ay"),
        talk("ay"),
        talk("ay"),
        talk("ux"),  # nothing is answered
    ]
    numbers = prompt_numbers(pa.table({"messages": talks})).tolist()
    assert [numbers.index(number) for number in numbers] == [0, 0, 2, 3, 4, 5, 0]
    pairs = pa.table(
        {"prompt": [talk("ux"), talk("uy"), talk("ux")], "chosen": [talk("aa")] * 3, "rejected": talks[:3]}
    )
    assert prompt_numbers(pairs).tolist() == [0, 1, 0]


def test_what_is_learned_of_a_prompt_does_not_make_another_but_what_the_template_reads_does() -> None:
    turns = pa.list_(
        pa.struct([(name, pa.string()) for name in ("role", "content", "more")] + [("learned", pa.bool_())])
    )
    first, last = talk("ux", more="{}"), talk("ab")
    talks = [
        first + talk("ay", learned=True) + last,
        first + talk("ay", learned=False) + last,
        talk("ux", more='{"name": "n"}') + talk("ay") + last,
    ]
    assert prompt_numbers(pa.table({"messages": pa.array(talks, turns)})).tolist() == [0, 0, 1]


def test_groups_go_where_their_middle_rows_are() -> None:
    clients = np.array([0, 1, 0, 1, 2, 2, -1], np.int32)
    groups = np.array([5, 5, 7, 7, 5, 2, 2])
    # The line of clients is 0 0 1 1 2 2. In it stand the groups 5 (3 rows) and 7 (2), whose first rows are of client 0,
    # and then 2 (1 row of client 2); their middles are the second, fourth and sixth places.
    assert together(clients, groups, np.zeros(7, np.int64)).tolist() == [0, 0, 1, 1, 0, 2, -1]
    # With strata, 5 stands in one line alone, 0 1 2, and 7 in another, 0 1.
    assert together(clients, groups, np.array([0, 1, 1, 0, 0, 2, 2])).tolist() == [1, 1, 0, 0, 1, 2, -1]


rows_of_groups = st.lists(
    st.tuples(st.integers(-1, 4), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=60
).map(lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True)))


@given(rows_of_groups)
def test_any_groups_are_kept_together(rows: tuple[np.ndarray, ...]) -> None:
    clients, groups, strata = rows
    strata = strata[groups % len(strata)]  # of a whole group
    moved = together(clients.astype(np.int32), groups, strata)
    assert ((moved < 0) == (clients < 0)).all()
    for group in np.unique(groups):
        assert len(np.unique(moved[(groups == group) & (moved >= 0)])) <= 1
    for stratum in np.unique(strata):
        inside = (strata == stratum) & (clients >= 0)
        largest = np.bincount(groups[inside]).max(initial=0)
        before, after = (np.bincount(each[inside], minlength=5) for each in (clients, moved))
        assert (np.abs(before - after) <= largest).all()
        assert not after[before == 0].any()  # nobody gets a category of which it had nothing
    alone = np.arange(len(clients))
    assert together(clients.astype(np.int32), alone, strata).tolist() == clients.tolist()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=60),
    heldout=st.floats(0, 0.99),
    unseen=st.floats(0, 0.99),
    draw=st.sampled_from(["random", "last"]),
    shared=st.booleans(),
    key=st.integers(0, 99),
)
def test_prompts_are_held_out_whole(
    rows: list[tuple[int, int]], heldout: float, unseen: float, draw: Any, shared: bool, key: int
) -> None:
    clients = np.array([client for client, _ in rows], np.int32)
    prompts = np.array([prompt + (0 if shared else 13 * client) for client, prompt in rows])
    splits = Splits(heldout=heldout, unseen=unseen, draw=draw, by="prompt")
    rng = np.random.Generator(np.random.Philox(key=key))
    held = splits.assign(clients, np.arange(5), rng, prompts)
    assert held.kept.tolist() == [client in clients for client in range(5)]
    trains = (held.kept & ~held.unseen)[clients]
    assert held.heldout[~trains].all() and trains.any()
    assert not set(prompts[trains & held.heldout]) & set(prompts[trains & ~held.heldout])
    for client in set(clients[trains].tolist()):
        mine = clients == client
        out = int(held.heldout[mine].sum())
        wanted = min(int(np.floor(heldout * mine.sum() + 0.5)), int(mine.sum()) - 1)
        sizes = np.unique(prompts[mine], return_counts=True)[1]
        assert out < mine.sum() and 2 * (out - wanted) <= sizes.max()
        if not shared and len(set(prompts[mine & ~held.heldout])) > 1:
            assert 2 * (wanted - out) <= sizes.max()


def test_prompts_of_one_row_each_are_held_out_as_rows_are() -> None:
    clients = np.repeat(np.arange(3, dtype=np.int32), (10, 5, 1))
    for draw in ("random", "last"):
        splits = Splits(heldout=0.3, unseen=0, draw=draw)  # type: ignore[arg-type]
        by_row, by_prompt = (
            splits.assign(clients, np.arange(3), np.random.Generator(np.random.Philox(key=3)), prompts).heldout.tolist()
            for prompts in (None, np.arange(16))
        )
        assert by_row == by_prompt
