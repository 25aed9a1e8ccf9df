"""Which rows each step takes, and which of them go through the model at once. Legend: B rows of a step."""

from collections.abc import Iterator

import numpy as np

from engine.config.train import Train


def batches(rows: int, train: Train, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields the row numbers (B,) of each step, for `train.steps` steps or `train.epochs` passes.

    A step takes `train.batch` * `train.accumulate` rows. Each pass shuffles all rows, and its last step takes the rest.
    """
    per_step = train.batch * train.accumulate
    per_pass = -(-rows // per_step)
    order = np.arange(0)
    for step in range(steps_of(rows, train)):
        if step % per_pass == 0:
            order = rng.permutation(rows)
        start = step % per_pass * per_step
        yield order[start : start + per_step]


def pieces(lengths_B: np.ndarray, most_tokens: int) -> list[np.ndarray]:
    """Cuts rows of these lengths into pieces of at most `most_tokens` tokens with padding; returns their row numbers.

    A piece has rows of similar length, and at least one row; the longest rows come first. If all rows fit into one
    piece, they keep their order.
    """
    if len(lengths_B) * int(lengths_B.max()) <= most_tokens:
        return [np.arange(len(lengths_B))]
    order, cut = np.argsort(-lengths_B, kind="stable"), list[np.ndarray]()
    first = 0
    while first < len(order):
        rows = max(1, most_tokens // int(lengths_B[order[first]]))
        cut.append(order[first : first + rows])
        first += rows
    return cut


def steps_of(rows: int, train: Train) -> int:
    """Returns the number of optimizer steps that a client of `rows` rows takes in a round."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return train.epochs * -(-rows // (train.batch * train.accumulate))
