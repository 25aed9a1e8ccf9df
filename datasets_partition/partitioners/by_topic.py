"""The partition by topic, for text without labels: rows are clustered, then dealt as if the cluster were a label."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datasets_partition.core.columns import Coded, column, is_list, texts
from datasets_partition.core.dealing import above_zero, at_least, enough_rows, numbered, text_columns
from datasets_partition.core.types import Assignment, DataError
from datasets_partition.partitioners.by_label import Dirichlet

# Topics are computed from at most SAMPLE rows; the others go to the nearest topic, BLOCK rows at a time.
SAMPLE, BLOCK = 1 << 15, 1 << 16
# Words are reduced to a few dimensions: among thousands, of which a short text has few, topics are less even.
# (Mini-batch k-means sometimes leaves nearly all short texts in one topic.)
DIMENSIONS = 64
LARGEST = 0.9  # with a larger share of the rows in one topic there is no skew to create
WORDS, LETTERS = 3, 12  # words in a topic's name, and letters of each


@dataclass(frozen=True, kw_only=True)
class ByTopic:
    """Like `Dirichlet`, over `topics` clusters of the rows by k-means instead of labels.

    Rows are the TF-IDF vectors of their text in `columns` (or of their whole content) over the `features` most frequent
    words, reduced by a singular value decomposition to 64 dimensions and unit length; or the lists in the column
    `embedding`. Beyond 32,768 rows, topics are those of a random sample. Needs scikit-learn, and gives the same topics
    with the same versions on the same kind of processor; on another, a row between two topics may land in the other.
    """

    kind: Literal["topic"] = "topic"
    clients: int
    topics: int = 10
    columns: tuple[str, ...] | None = None
    features: int = 4096
    embedding: str | None = None
    alpha: float = 0.5
    min_rows: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        at_least(1, clients=self.clients, topics=self.topics, features=self.features)
        above_zero(alpha=self.alpha)
        at_least(0, min_rows=self.min_rows)
        text_columns(self.columns, "has the topics")

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Raises DataError without scikit-learn, right columns, enough rows, or different topics; or as `Dirichlet`."""
        if self.topics > table.num_rows:
            raise DataError(
                f"data.partition.topics is {self.topics}, but there are only {table.num_rows} distinct rows: "
                f"ask for {table.num_rows} topics or fewer"
            )
        enough_rows(self.clients, table.num_rows, self.min_rows)  # before k-means, which takes long
        topics = self._clustered(table, rng)
        largest = int(np.bincount(topics.codes).max(initial=0))
        if self.topics > 1 and largest > LARGEST * table.num_rows:
            raise DataError(
                f"data.partition finds one topic with {largest} of {table.num_rows} rows among {self.topics}, which is "
                "no skew: name other columns in data.partition.columns, give an embedding, ask for another number of "
                'topics, or use kind = "iid"'
            )
        law = Dirichlet(
            label="topic", clients=self.clients, alpha=self.alpha, min_rows=self.min_rows, balanced=self.balanced
        )
        return law.divide(topics, rng)

    def _clustered(self, table: pa.Table, rng: np.random.Generator) -> Coded:
        try:
            from sklearn.cluster import KMeans
            from sklearn.decomposition import TruncatedSVD
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import Normalizer
            from threadpoolctl import threadpool_limits
        except ImportError:
            raise DataError(
                'data.partition.kind is "topic", which needs scikit-learn: '
                'pip install scikit-learn, or install fedpost with its extra "topics"'
            ) from None
        vectors, words = self._tf_idf(table) if self.embedding is None else (embedded(table, self.embedding), None)
        seed, rows = int(rng.integers(2**31)), table.num_rows
        size = max(SAMPLE, 4 * self.topics)
        sample = vectors if rows <= size else vectors[np.sort(rng.permutation(rows)[:size])]
        # One thread: several would add numbers in the order in which they happen to finish.
        with threadpool_limits(limits=1):
            is_wide = words is not None and min(sample.shape) > DIMENSIONS
            reduction = [TruncatedSVD(DIMENSIONS, random_state=seed), Normalizer()] if is_wide else []
            means = make_pipeline(*reduction, KMeans(self.topics, random_state=seed, n_init=3)).fit(sample)
            blocks = [means.predict(vectors[first : first + BLOCK]) for first in range(0, rows, BLOCK)]
        clusters: NDArray[np.int32] = np.concatenate(blocks).astype(np.int32)
        names = numbered(self.topics)
        return Coded(clusters, names if words is None else _described(names, clusters, vectors, words))

    def _tf_idf(self, table: pa.Table) -> tuple[Any, list[str]]:
        """The rows' vectors (rows, features), sparse; and the features, which are words."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        joined = pc.binary_join_element_wise(*texts(table, self.columns), pa.scalar("\n", pa.large_string()))
        documents = (text.as_py() for batch in joined.chunks for text in batch)
        vectorizer = TfidfVectorizer(max_features=self.features, sublinear_tf=True, dtype=np.float32)
        try:
            return vectorizer.fit_transform(documents), list(vectorizer.get_feature_names_out())
        except ValueError as error:
            raise DataError(
                f"data.partition finds no words in the rows ({error}): name columns of text in data.partition.columns"
            ) from None


def _described(numbers: pa.StringArray, codes: NDArray[np.int32], vectors: Any, words: list[str]) -> pa.StringArray:
    """The topics' numbers, each with the words whose mean weight in its rows is furthest above that in all rows."""
    names = []
    everywhere = np.asarray(vectors.sum(axis=0)).ravel() / len(codes)
    for topic, number in enumerate(numbers.to_pylist()):
        mine = codes == topic
        above = np.asarray(vectors[mine].sum(axis=0)).ravel() / max(1, np.count_nonzero(mine)) - everywhere
        first = [column for column in np.argsort(-above, kind="stable")[:WORDS] if above[column] > 0]
        names.append(" ".join([number, *(words[column][:LETTERS] for column in first)]))
    return pa.array(names)


def embedded(table: pa.Table, name: str) -> NDArray[np.float32]:
    """A column of lists of numbers of one length, as a matrix. Raises DataError where it holds anything else."""
    lists = column(table, "data.partition.embedding", name)
    if not is_list(lists.type):
        raise DataError(
            f"data.partition.embedding names {name!r}, which holds {lists.type}: name a column of lists of numbers"
        )
    lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise DataError(
            f"data.partition.embedding names {name!r}, whose lists are null, empty or of different lengths: "
            "give each row one list of the same length"
        )
    try:
        numbers = pc.list_flatten(lists).cast(pa.float32())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        numbers = pa.chunked_array([[None]], pa.float32())
    matrix: NDArray[np.float32] = pc.fill_null(numbers, float("nan")).to_numpy()
    if not np.isfinite(matrix).all():
        raise DataError(
            f"data.partition.embedding names {name!r}, whose lists hold values that are not finite numbers: "
            "correct them, or leave those rows out of the source"
        )
    return matrix.reshape(table.num_rows, lengths[0])
