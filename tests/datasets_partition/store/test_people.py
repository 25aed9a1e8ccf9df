"""No rows of an unseen person train, however many clients its rows are cut into."""

import json
from pathlib import Path

import pytest

from datasets_partition.core.types import Partitioner
from datasets_partition.partitioners.by_label import Dirichlet
from datasets_partition.partitioners.by_size import Iid, SizeCap
from datasets_partition.partitioners.combined import Combined
from datasets_partition.partitioners.natural import ByTime, GroupedNatural, Natural
from datasets_partition.sources.files import Jsonl
from datasets_partition.store.build import build
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import Store

PEOPLE, ROWS = 20, 10


def store_of(partitioner: Partitioner, folder: Path, splits: Splits = Splits(heldout=0.1, unseen=0.2)) -> Store:  # noqa: B008
    """The store of 20 people with 10 rows each; a row's prompt begins with its person."""
    path = folder / "rows.jsonl"
    rows = [
        {"client": f"p{i:02d}", "prompt": f"p{i:02d} {row}", "completion": "x", "topic": "ab"[row % 2], "time": row}
        for row in range(ROWS)
        for i in range(PEOPLE)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Store.open(build(Jsonl(path=str(path)), partitioner, splits, 7, str(folder)))


def people(store: Store, first: int, last: int) -> set[str]:
    """The people who have rows among some clients."""
    tables = [store.read_rows(client, split) for client in range(first, last) for split in ("train", "heldout")]
    return {prompt.split()[0] for table in tables for prompt in table["prompt"].to_pylist()}


CUTS = [
    (Combined(first=Natural(), then=SizeCap(rows=4)), 60),
    (Combined(first=ByTime(time="time"), then=SizeCap(rows=4)), 60),
    (Combined(first=Natural(), then=Iid(clients=2)), 40),
    (Combined(first=Natural(), then=Dirichlet(label="topic", clients=2, alpha=100.0)), 40),
    (Combined(first=Natural(), then=Combined(first=Natural(key="topic"), then=SizeCap(rows=3))), 80),
    (Combined(first=Combined(first=Natural(), then=SizeCap(rows=5)), then=SizeCap(rows=3)), 80),
    (Combined(first=Natural(), then=GroupedNatural(key="topic", max_rows=3)), 80),
    (Combined(first=Dirichlet(label="topic", clients=2, alpha=100.0), then=Natural()), None),
    (Combined(first=Iid(clients=3), then=Natural()), None),
    (GroupedNatural(max_rows=4), 60),
]


@pytest.mark.parametrize(("partitioner", "clients"), CUTS, ids=repr)
def test_no_part_of_an_unseen_person_trains(partitioner: Partitioner, clients: int | None, tmp_path: Path) -> None:
    store = store_of(partitioner, tmp_path)
    assert clients in (None, store.num_clients) and store.num_clients > PEOPLE
    training = people(store, 0, store.num_training)
    unseen = people(store, store.num_training, store.num_clients)
    assert len(unseen) == 4 and len(training) == 16 and not training & unseen  # a fifth of the people, not of the parts


def test_clients_that_are_not_people_are_unseen_as_a_whole_too(tmp_path: Path) -> None:
    """Groups of people, and synthetic clients, that are cut: the name before the slash is the first partition's."""
    for first in (GroupedNatural(keys=2), Iid(clients=10)):
        store = store_of(Combined(first=first, then=SizeCap(rows=7)), tmp_path)
        owners = [name.split("/")[0] for name in store.names(list(range(store.num_clients)))]
        training, unseen = set(owners[: store.num_training]), set(owners[store.num_training :])
        assert (len(training), len(unseen)) == (8, 2) and not training & unseen


def test_parts_with_too_few_rows_are_left_out_and_their_person_still_counts_once(tmp_path: Path) -> None:
    parts = Combined(first=Natural(), then=Natural(key="topic"))
    store = store_of(parts, tmp_path, Splits(heldout=0.1, unseen=0.2, min_rows=5))
    assert store.num_clients == 40 and store.num_clients - store.num_training == 8
    almost_all = store_of(GroupedNatural(max_rows=4), tmp_path, Splits(heldout=0, unseen=0.99))
    assert len(people(almost_all, 0, almost_all.num_training)) == 1  # one person always trains


@pytest.mark.parametrize(
    ("partitioner", "unit"),
    [
        (Natural(), None),
        (ByTime(time="time"), None),
        (Combined(first=Natural(), then=SizeCap(rows=4, surplus="drop")), None),
        (Combined(first=Natural(), then=SizeCap(rows=10)), None),  # nobody has more
        (GroupedNatural(max_rows=10), None),
        (GroupedNatural(max_rows=4), "a part of at most 4 rows of one value of the column 'client', of up to 3 parts"),
        (
            Combined(first=Natural(), then=SizeCap(rows=4)),
            "a part of at most 4 rows of one value of the column 'client', of up to 3 parts",
        ),
        (
            Combined(first=Natural(), then=Natural(key="topic")),
            "a part of one value of the column 'client', of up to 2 parts",
        ),
        (
            Combined(first=Iid(clients=2), then=SizeCap(rows=50)),
            "a part of at most 50 rows of one client of data.partition.first, of up to 2 parts",
        ),
        (GroupedNatural(keys=3), "a group of values of the column 'client'"),
        (Iid(clients=4), "rows that the partition deals out whatever their column 'client'"),
    ],
    ids=repr,
)
def test_a_store_says_what_its_clients_are(partitioner: Partitioner, unit: str | None, tmp_path: Path) -> None:
    assert store_of(partitioner, tmp_path).manifest.get("unit") == unit
