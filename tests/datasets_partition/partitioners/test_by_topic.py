import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners import by_topic
from datasets_partition.partitioners.by_topic import ByTopic

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
WORDS = ["goal match team striker", "court judge appeal verdict", "oven flour butter recipe"]
TOPICS = np.arange(150) % 3
TABLE = pa.table(
    {
        "prompt": [f"{word} {row}" for row, word in ((row, WORDS[row % 3].split()[row % 4]) for row in range(150))],
        "completion": [f"{WORDS[row % 3]}, said {row % 7}" for row in range(150)],
        "vector": [[float(row % 3 == axis) + row / 1e4 for axis in range(3)] for row in range(150)],
    }
)


def agree(category, topics):
    """Whether two labelings are the same but for the names."""
    return len(set(zip(category.to_pylist(), topics.tolist(), strict=True))) == len(set(topics.tolist()))


@pytest.mark.parametrize(
    "given", [{}, {"columns": ("completion",)}, {"embedding": "vector"}], ids=["content", "columns", "embedding"]
)
def test_topics_that_are_apart_are_found(given, rng):
    assignment = ByTopic(clients=4, topics=3, alpha=1.0, **given).assign(TABLE, rng())
    assert agree(assignment.category, TOPICS)


def test_topics_are_named_by_the_words_that_set_them_apart(rng):
    table = TABLE.set_column(0, "prompt", [["the " + text for text in TABLE["prompt"].to_pylist()]])
    names = sorted(set(ByTopic(clients=4, topics=3, alpha=1.0).assign(table, rng()).category.to_pylist()))
    assert [name.split()[0] for name in names] == ["0", "1", "2"]
    topic_words = {frozenset(name.split()[1:]) for name in names}
    assert all(any(words <= set(topic.split()) for topic in WORDS) and len(words) == 3 for words in topic_words)
    assignment = ByTopic(clients=4, topics=3, embedding="vector").assign(TABLE, rng())
    assert sorted(set(assignment.category.to_pylist())) == ["0", "1", "2"]


def test_more_clients_than_rows_are_refused_before_topics_are_sought(rng, monkeypatch):
    monkeypatch.setattr(ByTopic, "_clustered", lambda *_: pytest.fail("sought"))
    for given in ({"clients": 151}, {"clients": 10, "min_rows": 16}):
        with pytest.raises(DataError, match=r"but there are only 150 distinct rows"):
            ByTopic(topics=3, **given).assign(TABLE, rng())


def test_embeddings_may_be_of_any_list_type(rng):
    for kind in (pa.large_list(pa.float64()), pa.list_(pa.float32(), 3)):
        table = pa.table({"vector": TABLE["vector"].cast(kind)})
        assert agree(ByTopic(clients=4, topics=3, embedding="vector").assign(table, rng()).category, TOPICS)


def test_clients_are_skewed_in_topics(rng):
    clients = ByTopic(clients=3, topics=3, alpha=1e-6, min_rows=0).assign(TABLE, rng()).clients
    assert all(len(set(clients[topic == TOPICS].tolist())) == 1 for topic in range(3))


def test_more_topics_than_rows_are_refused(rng):
    with pytest.raises(
        DataError, match=r"topics is 151, but there are only 150 distinct rows: ask for 150 topics or f"
    ):
        ByTopic(clients=2, topics=151).assign(TABLE, rng())


def test_rows_without_words_are_refused(rng):
    table = pa.table({"prompt": ["?", "!"], "completion": [".", ""]})
    with pytest.raises(
        DataError, match=r"finds no words in the rows \(.*\): name columns of text in data\.partition\.col"
    ):
        ByTopic(clients=2, topics=2).assign(table, rng())


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (["a", "b"], r"which holds string: name a column of lists of numbers"),
        ([[1.0], [1.0, 2.0]], r"whose lists are null, empty or of different lengths: give each row one list"),
        ([[1.0], None], r"whose lists are null, empty or of different lengths"),
        ([[], []], r"whose lists are null, empty or of different lengths"),
        ([[1.0], [None]], r"whose lists hold values that are not finite numbers: correct them"),
        ([[1.0], [float("nan")]], r"whose lists hold values that are not finite numbers"),
        ([["a"], ["b"]], r"whose lists hold values that are not finite numbers"),
    ],
)
def test_what_is_no_embedding_is_refused(vectors, sentence, rng):
    with pytest.raises(DataError, match=rf"data\.partition\.embedding names 'v', {sentence}"):
        ByTopic(clients=1, topics=1, embedding="v").assign(pa.table({"v": vectors}), rng())


def test_without_scikit_learn_it_says_what_to_install(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(
        DataError, match=r'"topic", which needs scikit-learn: pip install scikit-learn, or install fedpos'
    ):
        ByTopic(clients=2, topics=2).assign(TABLE, rng())


def largest(table, rng, seeds, topics=10):
    """The share of the largest topic and the number of topics, for each seed."""
    shares = []
    for seed in range(seeds):
        category = ByTopic(clients=5, topics=topics).assign(table, rng(seed)).category.to_numpy(zero_copy_only=False)
        counts = np.unique(category, return_counts=True)[1]
        shares.append((counts.max() / len(category), len(counts)))
    return shares


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share", "seeds"), [("shakespeare", 0.4, 12), ("tldr_en", 0.5, 5)])
def test_no_topic_of_real_rows_is_nearly_all(name, share, seeds, rng, full):
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared data is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    table = pa.table(
        {
            "prompt": [row.get("prompt", "") for row in rows],
            "completion": [row.get("completion", row.get("text")) for row in rows],
        }
    )
    assert all(most < share and count == 10 for most, count in largest(table, rng, seeds if full else 2))


def speeches(rows, topics=10, words=20):
    """Short texts in which most words are anyone's, by Zipf's law, and a few are their topic's; and the topics."""
    drawn = np.random.default_rng(4)
    topic = drawn.integers(0, topics, rows)
    common = np.minimum(drawn.zipf(1.3, (rows, words)), 5000)
    letters = drawn.integers(0, 12, (rows, 4))
    texts = [
        " ".join([*(f"any{word}" for word in common[row]), *(f"t{topic[row]}w{word}" for word in letters[row])])
        for row in range(rows)
    ]
    return pa.table({"prompt": [""] * rows, "completion": texts}), topic


def test_no_topic_of_short_texts_is_nearly_all(rng):
    table, _ = speeches(3000)
    assert all(most < 0.5 and count == 10 for most, count in largest(table, rng, seeds=12))


def test_topics_of_a_sample_are_those_of_all_rows(rng, monkeypatch):
    monkeypatch.setattr(by_topic, "SAMPLE", 600)
    monkeypatch.setattr(by_topic, "BLOCK", 700)
    table, topic = speeches(3000)
    partitioner = ByTopic(clients=5, topics=10)
    assignment = partitioner.assign(table, rng())
    codes = np.array([int(name.split()[0]) for name in assignment.category.to_pylist()])
    assert assignment.category.equals(partitioner.assign(table, rng()).category)
    # Most rows of a found topic are of one topic.
    pairs = np.zeros((10, 10), int)
    np.add.at(pairs, (codes, topic), 1)
    assert pairs.max(axis=1).sum() > 0.6 * len(topic)
    vectors = pa.table({"vector": TABLE["vector"].take(pa.array(np.arange(3000) % 150))})
    assignment = ByTopic(clients=4, topics=3, embedding="vector").assign(vectors, rng())
    assert agree(assignment.category, np.arange(3000) % 150 % 3)


def test_more_topics_than_a_sample_has_rows_may_be_asked_for(rng, monkeypatch):
    monkeypatch.setattr(by_topic, "SAMPLE", 20)
    assignment = ByTopic(clients=4, topics=30, embedding="vector").assign(TABLE, rng())
    assert len(assignment.category.unique()) == 30


@pytest.mark.parametrize("given", [{"columns": ("completion",)}, {"embedding": "vector"}], ids=["text", "embedding"])
def test_a_topic_with_nearly_all_rows_is_refused(given, rng):
    apart = np.arange(150) < 10  # 140 of 150 rows are alike
    table = pa.table(
        {
            "completion": [("court", "goal")[row % 2] if odd else "flour" for row, odd in enumerate(apart)],
            "vector": [[float(row), 1.0] if odd else [0.0, 0.0] for row, odd in enumerate(apart)],
        }
    )
    with pytest.raises(
        DataError, match=r"finds one topic with 14\d of 150 rows among 3, which is no skew: name other columns"
    ):
        ByTopic(clients=2, topics=3, **given).assign(table, rng())
    only = ByTopic(clients=2, topics=1, **given).assign(table, rng())
    assert only.category.unique().to_pylist() == ["0"]
