"""Numbers of a recipe that are out of range."""

import pytest

from engine.config.sections import Clients, Evaluate
from engine.config.train import Train


@pytest.mark.parametrize("count", [2**31, 10_000_000_000, 10**400])
def test_counts_that_no_table_of_rows_can_hold_are_refused_before_anything_starts(count: int) -> None:
    """Rows of clients are counted in 32 bits: NumPy raised OverflowError once slots had started."""
    with pytest.raises(ValueError, match=r"^evaluate\.rows must be below 2\^31$"):
        Evaluate(rows=count)
    with pytest.raises(ValueError, match=r"^evaluate\.server_rows must be below 2\^31$"):
        Evaluate(server_rows=count)
    with pytest.raises(ValueError, match=r"^train\.steps must be below 2\^31$"):
        Train(steps=count)
    with pytest.raises(ValueError, match=r"^clients\.slots must be below 2\^31$"):
        Clients(slots=count)


def test_seeds_may_be_larger(small_recipe) -> None:  # type: ignore[no-untyped-def]
    assert small_recipe(f"seed={2**63}").seed == 2**63
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        small_recipe("seed=-1")
    assert Evaluate(rows=2**31 - 1).rows == 2**31 - 1
