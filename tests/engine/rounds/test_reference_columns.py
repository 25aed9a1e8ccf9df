"""Where the reference's columns pay, and how they stand beside the rows."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.config.federation import Federation
from engine.config.sections import Zero
from engine.config.train import Train
from engine.messages.row_columns import RowColumn
from engine.objectives.dpo import Dpo
from engine.rounds.reference_columns import pays


def test_columns_pay_once_all_rounds_train_more_rows_than_there_are(federation: Federation) -> None:
    """Ten clients of nine training rows and one held out: 100 rows; a round of 2 clients trains 2 x 3 x 4 = 24."""
    counts = {"train": np.full(10, 9), "heldout": np.full(10, 1)}
    tokens: Any = SimpleNamespace(counts=counts.__getitem__)

    def paid(rounds: int, **options: Any) -> bool:
        train = Train(steps=3, batch=4, objective=Dpo(**options))
        cohort = replace(federation.cohort, size=2)
        return pays(replace(federation, rounds=rounds, cohort=cohort, train=train), tokens, 10)

    assert [paid(rounds) for rounds in (1, 4, 5)] == [False, False, True]
    assert paid(5, reference="start") and not paid(5, reference="round") and not paid(5, reference="none")
    assert paid(1, precompute_ref_log_probs=True) and not paid(5, precompute_ref_log_probs=False)
    train = Train(steps=3, batch=4, objective=Dpo())
    gangs = replace(federation, rounds=5, train=train, clients=replace(federation.clients, zero=Zero(ranks=2)))
    assert not pays(gangs, tokens, 10)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_clients_rows_get_their_own_values(order: tuple[int, ...]) -> None:
    """In whatever order the slots answer; a client may have no held-out rows, or none at all."""
    train, heldout = np.array([2, 0, 1]), np.array([1, 0, 0])
    values = {0: [[1, 2], [3, 4], [5, 6]], 2: [[7, 8]]}
    parts = [(client, np.array(values.get(client, np.empty((0, 1))), np.float32)) for client in order]
    column = RowColumn.of("reference", parts, train, heldout)

    def beside(client: int, split: Any, rows: int) -> list[Any]:
        batch = pa.RecordBatch.from_pydict({"row": list(range(rows))})
        return column.beside(batch, client, split)["reference"].to_pylist()

    assert beside(0, "train", 2) == [[1, 2], [3, 4]] and beside(0, "heldout", 1) == [[5, 6]]
    assert beside(2, "train", 1) == [[7, 8]]
    with pytest.raises(AssertionError, match="missing"):
        RowColumn.of("reference", parts[:2], train, heldout)
