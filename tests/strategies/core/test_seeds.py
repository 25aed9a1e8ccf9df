from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.core.seeds import rng, seed_torch, torch_rng, torch_seed

PLACE = (7, 3, 12, "batches")


def drawn(*place: Any) -> list[int]:
    return rng(*place).integers(2**63, size=4).tolist()


def test_the_same_place_draws_the_same() -> None:
    assert drawn(*PLACE) == drawn(*PLACE)
    assert torch.equal(torch.rand(4, generator=torch_rng(*PLACE)), torch.rand(4, generator=torch_rng(*PLACE)))


def test_the_stream_is_the_one_recorded_here() -> None:
    """A machine that draws otherwise cannot reproduce anybody's run."""
    assert drawn(*PLACE) == [3447179768860317282, 4416436076217144612, 3733891091272591655, 6415372506397829552]
    assert rng(*PLACE).permutation(8).tolist() == [2, 7, 6, 3, 4, 1, 0, 5]
    assert torch_seed(7, 0, -1, "initial") == 8627911037109512605
    assert torch_rng(7, 0, -1, "initial").initial_seed() == 8627911037109512605


@pytest.mark.parametrize(
    "other", [(8, 3, 12, "batches"), (7, 4, 12, "batches"), (7, 3, 13, "batches"), (7, 3, 12, "dropout")]
)
def test_each_argument_matters(other: tuple[Any, ...]) -> None:
    assert not set(drawn(*PLACE)) & set(drawn(*other))
    assert torch_seed(*PLACE) != torch_seed(*other)


def test_digits_do_not_run_into_each_other() -> None:
    assert drawn(1, 11, 1, "cohort") != drawn(11, 1, 1, "cohort") != drawn(1, 1, 11, "cohort")


@given(st.integers(0), st.integers(0, 10**6), st.integers(-2, 10**6))
def test_torch_accepts_every_seed(seed: int, round_: int, client: int) -> None:
    drawn_seed = torch_seed(seed, round_, client, "dropout")
    assert 0 <= drawn_seed < 2**63
    torch.Generator().manual_seed(drawn_seed)


def test_torch_is_seeded_as_by_itself_and_remembers_nothing_of_it() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    kept = len(torch.cuda._queued_calls)
    seed_torch(5)
    assert torch.equal(torch.rand(3), expected)
    assert len(torch.cuda._queued_calls) == kept
