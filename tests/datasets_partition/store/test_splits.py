import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from datasets_partition.core.types import DataError
from datasets_partition.store.splits import Splits


def rng(key: int = 5) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def owners(*rows: int) -> NDArray[np.int32]:
    """Rows of each client, dealt in turns so that clients are interleaved."""
    return rng(9).permutation(np.repeat(np.arange(len(rows), dtype=np.int32), rows))


def test_shares_are_rounded_to_the_nearest_and_leave_a_training_row() -> None:
    clients = owners(1, 2, 4, 5, 14, 15, 100)
    held = Splits(heldout=0.1, unseen=0).assign(clients, np.arange(7), rng())
    assert np.bincount(clients[held.heldout], minlength=7).tolist() == [0, 0, 0, 1, 1, 2, 10]
    held = Splits(heldout=0.9, unseen=0).assign(clients, np.arange(7), rng())
    assert np.bincount(clients[held.heldout], minlength=7).tolist() == [0, 1, 3, 4, 13, 14, 90]
    assert held.kept.all() and not held.unseen.any()


def test_unseen_clients_hold_all_their_rows_out() -> None:
    clients = owners(3, 3, 3, 3, 3, 3)
    held = Splits(heldout=0, unseen=0.25).assign(clients, np.arange(6), rng())
    assert held.unseen.sum() == 2  # 1.5, halves up
    assert (held.heldout == held.unseen[clients]).all()


def test_one_client_always_trains() -> None:
    assert not Splits(unseen=0.9).assign(owners(4), np.arange(1), rng()).unseen.any()
    assert Splits(unseen=0.99).assign(owners(4, 4, 4), np.arange(3), rng()).unseen.sum() == 2


def test_small_clients_are_left_out_before_unseen_ones_are_drawn() -> None:
    held = Splits(unseen=0.5, min_rows=3).assign(owners(2, 3, 1, 9), np.arange(4), rng())
    assert held.kept.tolist() == [False, True, False, True]
    assert held.unseen.sum() == 1 and held.unseen[[1, 3]].any()
    with pytest.raises(DataError, match=r"data\.splits\.min_rows is 10, but no client has more than 9 rows: lower it"):
        Splits(min_rows=10).assign(owners(2, 9), np.arange(2), rng())


def test_the_rng_alone_decides() -> None:
    clients = owners(50, 50, 50, 50)
    first, same, other = (
        Splits(unseen=0.5).assign(clients, np.arange(4), rng(key)).heldout.tolist() for key in (1, 1, 2)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heldout": 1.0}, r"data\.splits\.heldout is 1\.0: give a share from 0"),
        ({"heldout": -0.1}, r"data\.splits\.heldout is -0\.1"),
        ({"unseen": float("nan")}, r"data\.splits\.unseen is nan"),
        ({"min_rows": 0}, r"data\.splits\.min_rows is 0: give 1 or more"),
    ],
)
def test_ranges(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Splits(**wrong)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    heldout=st.floats(0, 0.999),
    unseen=st.floats(0, 0.999),
    min_rows=st.integers(1, 5),
    key=st.integers(0, 1000),
)
def test_counts_add_up(rows: list[int], heldout: float, unseen: float, min_rows: int, key: int) -> None:
    rows[0] = max(rows[0], min_rows)
    clients = owners(*rows)
    held = Splits(heldout=heldout, unseen=unseen, min_rows=min_rows).assign(clients, np.arange(len(rows)), rng(key))
    assert held.kept.tolist() == [count >= min_rows for count in rows]
    assert (held.kept & ~held.unseen).any()
    assert held.unseen.sum() == min(np.floor(unseen * held.kept.sum() + 0.5), held.kept.sum() - 1)
    out = np.bincount(clients[held.heldout], minlength=len(rows))
    for client, count in enumerate(rows):
        if not held.kept[client]:
            assert out[client] == 0 and not held.unseen[client]
        elif held.unseen[client]:
            assert out[client] == count
        else:
            assert out[client] == min(np.floor(heldout * count + 0.5), count - 1)


def test_the_last_rows_are_held_out_where_the_recipe_says_so() -> None:
    clients = np.repeat(np.arange(2, dtype=np.int32), (10, 4))
    held = Splits(heldout=0.25, unseen=0, draw="last").assign(clients, np.arange(2), rng())
    assert np.flatnonzero(held.heldout).tolist() == [7, 8, 9, 13]


def test_the_server_has_its_share_of_all_rows() -> None:
    rows = np.arange(10)
    drawn = Splits(server=0.25).server_rows(rows, rng())
    assert drawn.sum() == 3 and drawn.tolist() != Splits(server=0.25).server_rows(rows, rng(6)).tolist()
    assert not Splits().server_rows(rows, rng()).any()
    with pytest.raises(DataError, match=r"data\.splits\.server is 1"):
        Splits(server=1)
