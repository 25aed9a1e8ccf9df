"""Real rows: speeches by speaker, shell commands by author, and preferences by trait; skipped where they are absent."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.partitioners.by_label import Dirichlet, Distribution, InnerDirichlet, Pathological, Shards
from datasets_partition.partitioners.by_size import BySize, Iid, SizeCap
from datasets_partition.partitioners.by_topic import ByTopic
from datasets_partition.partitioners.combined import Combined
from datasets_partition.partitioners.continuous import ByLength
from datasets_partition.partitioners.natural import GroupedNatural, Natural
from datasets_partition.sources.files import Jsonl
from datasets_partition.store.build import build
from datasets_partition.store.splits import Splits
from datasets_partition.store.stats import Skew
from datasets_partition.store.store import Store

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
UNIXES = ("common", "linux", "osx", "android", "freebsd", "sunos", "netbsd", "openbsd")
OTHERS = ("windows", "dos", "cisco-ios")


def real(name):
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared data is not here")
    return Jsonl(path=str(path))


@pytest.mark.parametrize(
    ("name", "rows", "clients", "columns"),
    [
        ("shakespeare", 7095, 298, {"prompt", "completion"}),
        ("tldr_en", 32136, 1819, {"prompt", "completion"}),
        ("persona_preferences", 14000, 14, {"prompt", "chosen", "rejected"}),
    ],
)
def test_all_rows_of_a_file_reach_their_clients(tmp_path, name, rows, clients, columns):
    loaded, skipped = real(name).load()
    assert (loaded.num_rows, skipped) == (rows, {}) and columns <= set(loaded.column_names)
    store = Store.open(build(real(name), Natural(), Splits(), 7, str(tmp_path)))
    skew, natural = Skew.of(store), len(set(loaded["client"].to_pylist()))
    assert natural == clients == store.num_clients + store.manifest["duplicate_clients"]
    assert skew.rows.total + skew.duplicate_rows == rows
    kept = pa.concat_tables([store.read_rows(i, s) for i in range(store.num_clients) for s in ("train", "heldout")])

    def contents(table):
        whole = table.select(sorted(columns)).to_pylist()
        return {json.dumps(row, sort_keys=True) for row in whole}

    assert contents(kept) == contents(loaded) and len(contents(kept)) == kept.num_rows
    if skew.duplicate_rows == 0:
        assert sorted(kept["client"].to_pylist()) == sorted(loaded["client"].to_pylist())


PARTITIONERS = [
    GroupedNatural(max_rows=20),
    Iid(clients=100),
    BySize(clients=100, law="lognormal"),
    Dirichlet(label="platform", clients=100, alpha=0.1, min_rows=0),
    Dirichlet(label="platform", clients=100, alpha=0.5, min_rows=5),
    InnerDirichlet(label="platform", clients=100, alpha=0.1),
    Shards(label="platform", clients=100, shards=2),
    Pathological(label="platform", clients=100, classes=2),
    Distribution(
        label="platform", shares={name: (0.9, 0.1) if name in UNIXES else (0.1, 0.9) for name in UNIXES + OTHERS}
    ),
    ByLength(clients=100),
    ByTopic(clients=50, topics=5, alpha=0.1),
    Combined(first=Natural(), then=SizeCap(rows=10)),
]


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=lambda p: f"{p.kind}-{PARTITIONERS.index(p)}")
def test_shell_commands_under_every_partition(tmp_path, partitioner):
    first, second = (
        Store.open(build(real("tldr_en"), partitioner, Splits(), 7, str(tmp_path / cache), label="platform"))
        for cache in ("first", "second")
    )
    assert (first.folder / "rows.parquet").read_bytes() == (second.folder / "rows.parquet").read_bytes()
    skew = Skew.of(first)
    assert skew.rows.total + skew.duplicate_rows + skew.left_out_rows == 32136
    assert skew.rows.least >= 1 and skew.categories is not None
    assert skew.categories.totals.sum() == skew.rows.total
    assert np.array_equal(np.bincount(skew.categories.clients, skew.categories.counts), skew.rows.each)


def test_a_smaller_alpha_is_more_skewed_on_real_labels(tmp_path):
    stores = [
        build(real("tldr_en"), Dirichlet(label="platform", clients=50, alpha=alpha), Splits(), 7, str(tmp_path))
        for alpha in (0.1, 1.0, 100.0)
    ]
    divergences = [Skew.of(Store.open(store)).categories.divergence for store in stores]
    assert divergences[0] > 2 * divergences[1] > 4 * divergences[2]
