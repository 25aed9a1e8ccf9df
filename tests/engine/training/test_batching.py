import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.train import Train
from engine.training.step_loop import batches, steps_of


def sizes(rows: int, train: Train) -> list[int]:
    return [len(batch) for batch in batches(rows, train, np.random.default_rng(1))]


@pytest.mark.parametrize(
    ("rows", "train", "expected"),
    [
        (5, Train(epochs=1, batch=2), [2, 2, 1]),
        (5, Train(epochs=2, batch=2), [2, 2, 1, 2, 2, 1]),
        (4, Train(epochs=2, batch=2), [2, 2, 2, 2]),
        (5, Train(steps=2, batch=2), [2, 2]),
        (5, Train(steps=5, batch=2), [2, 2, 1, 2, 2]),
        (3, Train(steps=3, batch=8), [3, 3, 3]),
        (1, Train(epochs=1, batch=1), [1]),
    ],
)
def test_sizes_by_hand(rows: int, train: Train, expected: list[int]) -> None:
    assert sizes(rows, train) == expected


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_each_pass_covers_every_row_once(rows: int, batch: int, amount: int, epochs: bool, seed: int) -> None:
    train = Train(epochs=amount, batch=batch) if epochs else Train(steps=amount * 3, batch=batch)
    steps = list(batches(rows, train, np.random.default_rng(seed)))
    assert len(steps) == steps_of(rows, train) == (amount * -(-rows // batch) if epochs else amount * 3)
    seen = np.concatenate(steps).tolist()
    for start in range(0, len(seen), rows):
        one_pass = seen[start : start + rows]
        assert len(set(one_pass)) == len(one_pass)
        if len(one_pass) == rows:
            assert sorted(one_pass) == list(range(rows))


def test_passes_come_in_new_orders_that_the_generator_decides() -> None:
    train = Train(epochs=2, batch=32)
    first, second = batches(32, train, np.random.default_rng(1))
    assert first.tolist() != second.tolist()
    again, _ = batches(32, train, np.random.default_rng(1))
    other, _ = batches(32, train, np.random.default_rng(2))
    assert first.tolist() == again.tolist() != other.tolist()
