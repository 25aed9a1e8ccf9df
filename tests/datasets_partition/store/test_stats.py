"""Skew in numbers, against values worked out by hand and against definitions written plainly."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets_partition.store.stats import Categories, Sizes, Skew, TokenLengths
from datasets_partition.store.store import INDEX, ROWS_PER_GROUP, Store, write_arrow
from datasets_partition.store.tokens import tokenize

COUNTS = {
    "duplicate_rows": 4,
    "duplicate_clients": 0,
    "skipped_rows": {"no text": 2},
    "left_out_clients": 1,
    "left_out_rows": 3,
    "unassigned_rows": 0,
}


def stored(
    folder: Path, train: list[int], heldout: list[int], categories: list[str | None] | None = None, server: int = 0
) -> Store:
    """A store written by hand: each row's text is as many letters as its position in the file, plus one."""
    owned, servers = np.add(train, heldout), [server] * bool(server)  # the latter: the server's line, if it has rows
    total = np.array([*owned, *servers])
    names = [f"c{client}" for client in range(len(train))]
    owners = [*np.repeat(names, owned).tolist(), *[None] * server]
    columns = {"client": pa.array(owners, pa.string()), "text": ["x" * (row + 1) for row in range(total.sum())]}
    if categories is not None:
        columns["category"] = pa.array(categories, pa.string())
    index = [
        [*names, *[None] * len(servers)],
        np.cumsum(total) - total,
        np.array([*train, *[0] * len(servers)], np.int32),
        np.array([*heldout, *servers], np.int32),
    ]
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=ROWS_PER_GROUP)
    write_arrow(folder / "index.arrow", pa.table(index, schema=INDEX))
    manifest = {"clients": len(train), "unseen_clients": train.count(0), "server_rows": server, **COUNTS}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Store.open(folder)


def encode(rows: pa.Table) -> pa.Table:
    """A token for each letter; a row of three letters is dropped."""
    ids = [None if len(text) == 3 else [7] * len(text) for text in rows["text"].to_pylist()]
    return pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))})


def categories_of(table: list[list[int]]) -> Categories:
    """From counts written out: a line for each client, a column for each category."""
    counts = np.array(table)
    clients, codes = np.nonzero(counts)
    return Categories([str(code) for code in range(counts.shape[1])], clients, codes, counts[clients, codes])


def entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([5], 0),
        ([3, 3, 3], 0),
        ([0, 0, 0, 12], 3 / 4),
        ([1, 3], 1 / 4),  # mean difference (0 + 2 + 2 + 0) / 4 = 1, over twice the mean, 4
        ([4, 1, 1, 2], 10 / 32),  # -3 - 1 + 2 + 3 * 4 = 10, over 4 * 8
        ([0, 0], 0),
    ],
)
def test_gini_by_hand(sizes: list[int], expected: float) -> None:
    assert Sizes(np.array(sizes)).gini == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any), st.randoms())
def test_gini_is_the_mean_difference_and_knows_no_order(sizes: list[int], random) -> None:
    gini = Sizes(np.array(sizes)).gini
    differences = np.abs(np.subtract.outer(sizes, sizes)).mean()
    assert 0 <= gini <= 1 - 1 / len(sizes) + 1e-12
    assert gini == pytest.approx(differences / (2 * np.mean(sizes)), abs=1e-12)
    shuffled = random.sample(sizes, len(sizes))
    assert Sizes(np.array(shuffled)).gini == gini
    assert Sizes(np.full(len(sizes), max(sizes))).gini == 0


def test_the_spread_of_sizes() -> None:
    sizes = Sizes(np.array([4, 1, 9, 2]))
    assert (sizes.total, sizes.least, sizes.median, sizes.most) == (16, 1, 3.0, 9)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[3, 3], [1, 1], [7, 7]], 0),
        ([[4]], 0),
        # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): H(m) - (H(p) + H(q)) / 2, the same for both.
        ([[2, 0], [0, 2]], 0.8112781244591328 - 0.5),
        # q = (3/4, 1/4). Client 0 has 3 rows of 4: m = (7/8, 1/8), H(m) - H(q) / 2. Client 1: m = (3/8, 5/8).
        (
            [[3, 0], [0, 1]],
            0.75 * (0.5435644431995964 - 0.8112781244591328 / 2) + 0.25 * (0.9544340029249649 - 0.8112781244591328 / 2),
        ),
    ],
)
def test_label_divergence_by_hand(table: list[list[int]], expected: float) -> None:
    assert categories_of(table).divergence == pytest.approx(expected, abs=1e-12)


TABLES = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 50), min_size=width, max_size=width).filter(any), min_size=1)
)


@given(TABLES, st.randoms())
def test_label_divergence_is_its_definition_and_knows_no_order(table: list[list[int]], random) -> None:
    counts = np.array(table)
    everybody = counts.sum(axis=0) / counts.sum()
    terms = [
        row.sum() * (entropy((row / row.sum() + everybody) / 2) - (entropy(row / row.sum()) + entropy(everybody)) / 2)
        for row in counts
    ]
    divergence = categories_of(table).divergence
    assert 0 <= divergence <= 1
    assert divergence == pytest.approx(sum(terms) / counts.sum(), abs=1e-9)
    assert categories_of(random.sample(table, len(table))).divergence == pytest.approx(divergence, abs=1e-12)


def test_label_divergence_comes_near_1_where_each_of_many_clients_has_its_own_category() -> None:
    divergences = [categories_of(np.eye(clients, dtype=int).tolist()).divergence for clients in (2, 10, 100, 1000)]
    assert divergences == sorted(divergences) and 0.99 < divergences[-1] < 1


def test_what_a_store_holds(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [3, 1, 0], [1, 0, 2], ["a", "a", "b", "b", "b", "a", "c", *[None] * 5], server=5)
    skew = Skew.of(store)
    assert (skew.training_clients, skew.unseen_clients) == (2, 1)
    assert (skew.train_rows, skew.heldout_rows, skew.unseen_rows, skew.server_rows) == (4, 1, 2, 5)
    assert skew.rows.each.tolist() == [4, 1, 2]
    assert (skew.duplicate_rows, skew.skipped_rows, skew.left_out_clients, skew.left_out_rows) == (
        4,
        {"no text": 2},
        1,
        3,
    )
    assert skew.categories is not None
    assert [skew.categories.names[code] for code in skew.categories.codes] == ["a", "b", "b", "a", "c"]
    assert skew.categories.clients.tolist() == [0, 0, 1, 2, 2]
    assert skew.categories.counts.tolist() == [2, 2, 1, 1, 1]
    assert skew.categories.totals.tolist() == [3, 3, 1]


def test_a_store_without_categories_has_none(tmp_path: Path) -> None:
    assert Skew.of(stored(tmp_path / "store", [2, 1], [0, 1])).categories is None


def test_categories_across_row_groups(tmp_path: Path) -> None:
    rows = 3 * ROWS_PER_GROUP
    # Other values first in each row group, so that each has its own dictionary.
    categories = [f"k{row * 7 // ROWS_PER_GROUP}" for row in range(rows)]
    categories_read = Skew.of(stored(tmp_path / "store", [rows - 10, 9], [1, 0], categories)).categories
    assert categories_read is not None
    assert dict(zip(categories_read.names, categories_read.totals.tolist(), strict=True)) == {
        name: categories.count(name) for name in categories
    }
    assert categories_read.counts[categories_read.clients == 1].tolist() == [9]


def test_token_lengths_of_rows_and_clients(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [2, 1, 0], [1, 0, 2], server=3)
    lengths = TokenLengths.of(store, tokenize(store, "letters", encode))
    assert lengths.rows.tolist() == [1, 2, 4, 5, 6]
    assert lengths.clients.each.tolist() == [3, 4, 11]
    assert lengths.dropped == 1


def test_token_lengths_across_batches_and_of_a_client_whose_rows_are_all_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets_partition.store.tokens.ROWS_PER_BATCH", 2)
    store = stored(tmp_path / "store", [2, 1, 3], [0, 0, 1])
    tokens = tokenize(store, "letters", encode)
    assert tokens.batches.num_record_batches > 1
    lengths = TokenLengths.of(store, tokens)
    assert lengths.rows.tolist() == [1, 2, 4, 5, 6, 7]
    assert lengths.clients.each.tolist() == [3, 0, 22]


def test_token_lengths_where_every_row_is_dropped(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [2], [1])
    tokens = tokenize(
        store, "none", lambda rows: pa.table({"input_ids": pa.nulls(rows.num_rows, pa.list_(pa.int32()))})
    )
    lengths = TokenLengths.of(store, tokens)
    assert (len(lengths.rows), lengths.clients.total, lengths.dropped) == (0, 0, 3)
