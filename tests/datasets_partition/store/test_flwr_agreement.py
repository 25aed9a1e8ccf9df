"""A second opinion: partitions as flwr-datasets makes them, exactly where nothing is random, as a law otherwise."""

import os

import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.by_label import Dirichlet, Distribution, InnerDirichlet, Pathological, Shards
from datasets_partition.partitioners.by_size import BySize, Iid
from datasets_partition.partitioners.continuous import Continuous
from datasets_partition.partitioners.natural import GroupedNatural, Natural

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when it is imported
flwr = pytest.importorskip("flwr_datasets.partitioner", reason="flwr-datasets is not installed")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings(
    "ignore:The specified min_partition_size",
    "ignore:The sum of",
    "ignore:Classes:",
    "ignore:Specifying null_placement",
)

# Rows of 5 labels in no order; the labels have 30, 60, 90, 120 and 200 rows.
LABELS = np.random.default_rng(1).permutation(np.repeat(range(5), (30, 60, 90, 120, 200)))
COLUMNS = {
    "row": list(range(500)),
    "label": LABELS.tolist(),
    "client": [f"writer {number}" for number in np.random.default_rng(2).integers(0, 57, 500)],
    "x": np.random.default_rng(3).normal(5, 2, 500).tolist(),
}
TABLE = pa.table(COLUMNS)
DATASET = datasets.Dataset.from_dict(COLUMNS)


def theirs(partitioner):
    """The rows of each of their clients."""
    partitioner.dataset = DATASET
    return [sorted(partitioner.load_partition(client)["row"][:]) for client in range(partitioner.num_partitions)]


def ours(partitioner, rng):
    clients = partitioner.assign(TABLE, rng).clients
    return [np.flatnonzero(clients == client).tolist() for client in range(clients.max() + 1)]


def mixtures(parts):
    """How many rows of each label, a column, each client has, a row."""
    return np.stack([np.bincount(LABELS[rows], minlength=5) for rows in parts])


def sizes(parts):
    return [len(rows) for rows in parts]


@pytest.mark.parametrize("rest", ["smaller", "bigger", "drop"])
@pytest.mark.parametrize("keys", [1, 2, 8, 57])
def test_grouped_natural(keys, rest, rng):
    mode = {"smaller": "allow-smaller", "bigger": "allow-bigger", "drop": "drop-reminder"}[rest]
    expected = flwr.GroupedNaturalIdPartitioner("client", keys, mode, sort_unique_ids=True)
    assert ours(GroupedNatural(keys=keys, rest=rest), rng()) == theirs(expected)


def test_natural(rng):
    assert ours(Natural(), rng()) == theirs(flwr.NaturalIdPartitioner("client"))


@pytest.mark.parametrize("clients", [1, 3, 7, 500])
def test_iid_sizes(clients, rng):
    assert sizes(ours(Iid(clients=clients), rng())) == sizes(theirs(flwr.IidPartitioner(clients)))


@pytest.mark.parametrize(
    ("law", "expected", "clients"),
    [
        ("linear", flwr.LinearPartitioner, (1, 2, 13, 31)),
        ("square", flwr.SquarePartitioner, (1, 2, 9, 10)),
        ("exponential", flwr.ExponentialPartitioner, (1, 2, 5, 6)),
    ],
)
def test_sizes_of_a_law(law, expected, clients, rng):
    for number in clients:
        assert sizes(ours(BySize(clients=number, law=law), rng())) == sizes(theirs(expected(number)))
    with pytest.raises(ValueError, match="sizes"):
        theirs(expected(2 * clients[-1]))
    with pytest.raises(DataError):
        ours(BySize(clients=2 * clients[-1], law=law), rng())


def test_given_sizes(rng):
    assert sizes(ours(BySize(sizes=(5, 300, 1)), rng())) == sizes(theirs(flwr.SizePartitioner([5, 300, 1])))


@pytest.mark.parametrize("clients", [3, 11])
def test_continuous_when_it_sorts(clients, rng):
    expected = flwr.ContinuousPartitioner(clients, "x", strictness=1.0)
    assert ours(Continuous(column="x", clients=clients, strictness=1.0), rng()) == theirs(expected)


@pytest.mark.parametrize(("clients", "classes"), [(4, 2), (5, 1), (9, 3), (12, 5)])
def test_pathological_when_it_is_deterministic(clients, classes, rng):
    partitioner = Pathological(label="label", clients=clients, classes=classes, mode="deterministic")
    expected = theirs(flwr.PathologicalPartitioner(clients, "label", classes, "deterministic"))
    assert mixtures(ours(partitioner, rng())).tolist() == mixtures(expected).tolist()


def test_distribution(rng):
    # Theirs has an array of labels by holders; here it is written out over the clients, client i holding i and i + 1.
    compact = np.random.default_rng(4).lognormal(0, 1, (5, 4))
    full, taken = np.zeros((5, 10)), [0] * 5
    for client in range(10):
        for label in (client % 5, (client + 1) % 5):
            full[label, client] = compact[label, taken[label]]
            taken[label] += 1
    expected = mixtures(theirs(flwr.DistributionPartitioner(compact, 10, 2, "label", 0)))
    shares = {str(label): tuple(row) for label, row in enumerate(full.tolist())}
    mixture = mixtures(ours(Distribution(label="label", shares=shares), rng()))
    assert ((mixture > 0) == (expected > 0)).all()
    # They round all down and give one holder what that leaves over: no more than a row for each of the four.
    apart = mixture - expected
    assert (np.sort(np.abs(apart), axis=0)[:-1] <= 1).all() and np.abs(apart).max() <= 4


def shapes(parts):
    """What is compared of a random partition: sizes, and how many rows of each label who has, both in order."""
    counts = mixtures(parts)
    return np.concatenate([np.sort(counts.sum(axis=1)), np.sort(counts, axis=0).ravel()])


def apart(left, other, tolerance=0.0):
    """By how many standard errors two samples are apart, at most, in their means and in how far they spread.

    What is within `tolerance` is not apart.
    """
    left, other = np.stack(left).astype(float), np.stack(other).astype(float)
    middle = (left.mean(axis=0) + other.mean(axis=0)) / 2
    distances = []
    for a, b in ((left, other), (np.abs(left - middle), np.abs(other - middle))):
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        difference = np.maximum(np.abs(a.mean(axis=0) - b.mean(axis=0)) - tolerance, 0)
        distances.append(np.max(difference / np.maximum(error, 1e-9)))
    return max(distances)


RANDOM = [
    (
        Dirichlet(label="label", clients=6, alpha=0.5, min_rows=0),
        lambda seed: flwr.DirichletPartitioner(6, "label", 0.5, min_partition_size=0, seed=seed),
    ),
    (
        Dirichlet(label="label", clients=6, alpha=0.5, min_rows=15),
        lambda seed: flwr.DirichletPartitioner(6, "label", 0.5, min_partition_size=15, seed=seed),
    ),
    (
        Dirichlet(label="label", clients=6, alpha=5.0, balanced=True),
        lambda seed: flwr.DirichletPartitioner(6, "label", 5.0, min_partition_size=1, self_balancing=True, seed=seed),
    ),
    (
        Dirichlet(label="label", clients=4, alpha=(4.0, 2.0, 2.0, 0.5)),
        lambda seed: flwr.DirichletPartitioner(4, "label", [4.0, 2.0, 2.0, 0.5], min_partition_size=1, seed=seed),
    ),
    (
        InnerDirichlet(label="label", sizes=(30, 20, 10), alpha=(3.0, 1.0, 1.0, 0.5, 0.1)),
        lambda seed: flwr.InnerDirichletPartitioner([30, 20, 10], "label", [3.0, 1.0, 1.0, 0.5, 0.1], seed=seed),
    ),
    (
        Pathological(label="label", clients=6, classes=2),
        lambda seed: flwr.PathologicalPartitioner(6, "label", 2, "random", seed=seed),
    ),
    (
        Pathological(label="label", clients=6, classes=3, mode="first_deterministic"),
        lambda seed: flwr.PathologicalPartitioner(6, "label", 3, "first-deterministic", seed=seed),
    ),
    (Shards(label="label", clients=6, shards=2), lambda seed: flwr.ShardPartitioner(6, "label", 2, seed=seed)),
    (
        Shards(label="label", clients=6, shards=2, shard_rows=30),
        lambda seed: flwr.ShardPartitioner(6, "label", 2, 30, seed=seed),
    ),
    (
        Shards(label="label", clients=6, shard_rows=35),
        lambda seed: flwr.ShardPartitioner(6, "label", shard_size=35, seed=seed),
    ),
    (
        Shards(label="label", clients=6, shard_rows=35, keep_rest=True),
        lambda seed: flwr.ShardPartitioner(6, "label", shard_size=35, keep_incomplete_shard=True, seed=seed),
    ),
    (  # so large that labels run out
        InnerDirichlet(label="label", sizes=(150, 100, 100, 50, 50), alpha=0.5),
        lambda seed: flwr.InnerDirichletPartitioner([150, 100, 100, 50, 50], "label", 0.5, seed=seed),
    ),
]


@pytest.fixture
def our_draws(rng, full):
    """Draws shapes of our partitions."""
    return lambda partitioner, shape=shapes: [
        shape(ours(partitioner, rng(seed))) for seed in range(1000 if full else 300)
    ]


@pytest.fixture
def their_draws(full):
    """Draws shapes of theirs: fewer, as they take most of the time."""
    return lambda make, shape=shapes: [shape(theirs(make(seed))) for seed in range(200 if full else 60)]


@pytest.mark.slow
@pytest.mark.parametrize(("partitioner", "expected"), RANDOM)
def test_random_partitions_have_the_same_law(partitioner, expected, our_draws, their_draws):
    # They cut each label's rows at shares rounded down, here the cuts are unbiased: less than a row apart.
    tolerance = 1.0 if isinstance(partitioner, Dirichlet) else 0.0
    assert apart(our_draws(partitioner), their_draws(expected), tolerance) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("strictness", [0.0, 0.4, 0.8])
def test_continuous_has_the_same_law(strictness, our_draws, their_draws):
    x = np.array(COLUMNS["x"])

    def moments(parts):
        return np.concatenate([[x[rows].mean() for rows in parts], [x[rows].std() for rows in parts]])

    drawn = our_draws(Continuous(column="x", clients=5, strictness=strictness), moments)
    expected = their_draws(lambda seed: flwr.ContinuousPartitioner(5, "x", strictness, seed=seed), moments)
    assert apart(drawn, expected) < 4.5


@pytest.mark.slow
def test_the_comparison_tells_laws_apart(our_draws, their_draws):
    expected = their_draws(RANDOM[0][1])
    for other in (
        Dirichlet(label="label", clients=6, alpha=1.0, min_rows=0),
        InnerDirichlet(label="label", clients=6, alpha=0.5),
    ):
        assert apart(our_draws(other), expected, tolerance=1.0) > 6
