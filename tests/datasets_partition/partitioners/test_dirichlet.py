import re

import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import DataError
from datasets_partition.partitioners.by_label import Dirichlet

LABEL_ROWS = (600, 300, 100)
TABLE = pa.table({"label": [label for label, rows in zip("abc", LABEL_ROWS, strict=True) for _ in range(rows)]})
LABELS = np.repeat(range(3), LABEL_ROWS)


def counts(partitioner, rng):
    """The rows of each label, a row, that each client has, a column."""
    clients = partitioner.assign(TABLE, rng).clients
    return np.stack([np.bincount(clients[label == LABELS], minlength=partitioner.clients) for label in range(3)])


def test_the_category_is_the_label(rng):
    assert Dirichlet(label="label", clients=3).assign(TABLE, rng()).category.equals(TABLE["label"].chunk(0))


def test_every_row_has_a_client(rng):
    rows = counts(Dirichlet(label="label", clients=7), rng())
    assert rows.sum(axis=1).tolist() == list(LABEL_ROWS)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_shares_have_the_mean_and_the_variance_of_the_law(alpha, rng):
    # A share of a symmetric Dirichlet law over n has the mean 1 / n and the variance (1/n)(1 - 1/n) / (n alpha + 1).
    clients = 4
    partitioner = Dirichlet(label="label", clients=clients, alpha=alpha, min_rows=0)
    shares = []
    for seed in range(600):
        assignment = partitioner.assign(TABLE, rng(seed))
        numbers = np.array(assignment.names.to_pylist(), int)  # clients without rows are left out
        of_first = np.bincount(numbers[assignment.clients[LABELS == 0]], minlength=clients)
        shares.append(of_first / LABEL_ROWS[0])
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.mean(shares, axis=0) == pytest.approx(1 / clients, abs=4 * np.sqrt(variance / 600))
    assert np.var(shares) == pytest.approx(variance, rel=0.1)


def test_balanced_gives_full_clients_no_further_labels(rng):
    for seed in range(50):
        rows = counts(Dirichlet(label="label", clients=5, alpha=0.5, balanced=True, min_rows=0), rng(seed))
        before = np.cumsum(rows, axis=0) - rows
        assert not rows[before > 1000 / 5].any()


def test_each_client_has_its_least_rows(rng):
    for seed in range(20):
        assert counts(Dirichlet(label="label", clients=5, alpha=0.5, min_rows=20), rng(seed)).sum(axis=0).min() >= 20


def test_a_least_number_that_is_not_met_is_refused_with_what_was(rng):
    with pytest.raises(DataError) as error:
        Dirichlet(label="label", clients=50, alpha=0.05, min_rows=10).assign(TABLE, rng())
    assert str(error.value) == (
        "data.partition.min_rows is 10, but in 20 tries with alpha = 0.05 the smallest of 50 clients had 0 rows at "
        "best: lower min_rows to 0 (which leaves clients without rows out), raise alpha, or ask for fewer clients"
    )


def test_what_was_met_at_best_can_be_asked_for(rng):
    with pytest.raises(DataError, match=r"had \d+ rows at best: lower min_rows to \d+, raise") as error:
        Dirichlet(label="label", clients=10, alpha=0.8, min_rows=90).assign(TABLE, rng())
    best = int(re.findall(r"lower min_rows to (\d+)", str(error.value))[0])
    assert 0 < best < 90
    assert counts(Dirichlet(label="label", clients=10, alpha=0.8, min_rows=best), rng()).sum(axis=0).min() == best


def test_a_least_number_that_cannot_be_met_is_refused_untried(rng):
    with pytest.raises(
        DataError, match=r"is 11 for 100 clients, but there are only 1000 distinct rows: lower it to 10"
    ):
        Dirichlet(label="label", clients=100, min_rows=11).assign(TABLE, rng())


def test_clients_without_rows_are_left_out_on_request(rng):
    clients, names, *_ = Dirichlet(label="label", clients=500, alpha=0.05, min_rows=0).assign(TABLE, rng())
    assert len(names) < 200 and set(clients.tolist()) == set(range(len(names)))
    assert names.to_pylist() == sorted(names.to_pylist()) and len(names[0].as_py()) == 3


def test_a_tiny_alpha_gives_each_label_to_one_client(rng):
    assert ((counts(Dirichlet(label="label", clients=5, alpha=1e-6, min_rows=0), rng()) > 0).sum(axis=1) == 1).all()


def test_rows_without_a_label_are_refused(rng):
    with pytest.raises(DataError, match=r"data\.partition\.label names 'label', which is null or empty in 1 of 2 rows"):
        Dirichlet(label="label", clients=2).assign(pa.table({"label": ["a", None]}), rng())


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        ((1.0, 2.0), r"^data\.partition\.alpha has 2 numbers for 3 clients: give one number, or one for each$"),
        ((1.0, 0.0, 1.0), r"^data\.partition\.alpha is \(1\.0, 0\.0, 1\.0\): give a number above 0$"),
    ],
)
def test_an_alpha_for_each_client_is_checked(alpha, said):
    with pytest.raises(DataError, match=said):
        Dirichlet(label="label", clients=3, alpha=alpha)


def test_clients_with_a_larger_alpha_have_more_rows(rng):
    table = pa.table({"label": np.arange(4000) % 40})
    clients = Dirichlet(label="label", clients=3, alpha=(8.0, 4.0, 1.0)).assign(table, rng()).clients
    shares = np.bincount(clients) / 4000
    assert shares == pytest.approx([8 / 13, 4 / 13, 1 / 13], abs=0.07)
