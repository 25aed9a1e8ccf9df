"""`fedpost strategies`: every member is there, and it fits 100 columns."""

from typing import get_args

import pytest

from experiments.cli.listing import WIDTH, first_sentence, listing
from strategies import Strategies, Transforms


def test_every_strategy_and_transform_is_listed_within_the_width():
    lines = [line.plain for line in listing()]
    assert max(map(len, lines)) <= WIDTH
    named = {line.split()[0] for line in lines if line and not line.startswith(" ")}
    assert {member().kind for member in get_args(Strategies) + get_args(Transforms)} <= named


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("fedavg", ["fedavg", "sum", "-", "-", "yes", "-", "arXiv", "1602.05629"]),
        ("hetlora", ["hetlora", "sum", "needed", "mixed", "-", "yes", "arXiv", "2401.06432"]),
        ("rfa", ["rfa", "passes", "-", "-", "-", "-", "arXiv", "1912.13445"]),
    ],
)
def test_a_row_says_what_a_rule_reads_needs_and_allows(kind, row):
    (line,) = [line.plain for line in listing() if line.plain.startswith(f"{kind} ")]
    assert line.split() == row


def test_keys_stand_with_their_defaults():
    lines = [line.plain.strip() for line in listing()]
    assert 'lr=1.0, weighting="examples", mu=0.01' in lines
    assert 'lr=1.0, weighting="uniform", f=1, m=unset' in lines


def test_the_first_sentence_ends_at_its_stop():
    assert first_sentence("a = b, c(0.5), ...: d.\n  More. Yet more.") == "a = b, c(0.5), ...: d."
    assert first_sentence("Rounds 0, 2, ... come first") == "Rounds 0, 2, ... come first"
