"""`fedpost objectives`: the list, and what --check finds in a reward of one's own."""

from typing import get_args

import pytest

from engine.messages.errors import RunError
from engine.objectives import Objectives
from engine.objectives.reinforcement.rewards import Rewards
from experiments.cli.listing import WIDTH
from experiments.cli.objective_list import objective_listing
from experiments.cli.reward_check import show_reward_check

OWN = """
import random

CALLS = []

def good(prompt, completion, row):
    return None if not completion else len(completion) // 8 + (row["level"] == "42")

def breaks(prompt, completion, row):
    return 1 / len(completion)

def is_text(prompt, completion, row):
    return "1"

def is_lucky(prompt, completion, row):
    return random.random()

def counts(prompt, completion, row):
    CALLS.append(completion)
    return len(CALLS)

def goes_by_the_last(prompt, completion, row):
    CALLS[:] = [*CALLS, completion][-2:]
    return float(len(CALLS[0]))

def changes(prompt, completion, row):
    row["seen"] = True
    return 1.0

def goes_by_hashes(prompt, completion, row):
    return hash(completion) % 1000
"""


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_scores.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def check(name):
        passed = show_reward_check(f"own_scores:{name}")
        return passed, capsys.readouterr().out.splitlines()

    return check


def failed(lines):
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith("failed")]


def test_a_function_of_its_arguments_passes(checked):
    passed, lines = checked("good")
    assert passed and len([line for line in lines if line.startswith("ok")]) == 5
    assert lines[-1] == "own_scores:good gives 2, none, 3, 4, 2, 351: none of 5 promises are broken"


@pytest.mark.parametrize(
    ("name", "promise", "why"),
    [
        ("breaks", "gives a finite number or None", "ZeroDivisionError: division by zero (the completion is '')"),
        ("is_text", "gives a finite number or None", "TypeError: it returned a str"),
        ("is_lucky", "gives the same when called again", "draw no random numbers"),
        ("counts", "gives the same when called again", "it may keep nothing"),
        ("goes_by_the_last", "gives the same after other completions", "it may keep nothing"),
        ("changes", "leaves its prompt and row alone", "which other rewards read too"),
        ("goes_by_hashes", "gives the same in another process", "nor go by the order of a set"),
    ],
)
def test_what_breaks_is_named(checked, name, promise, why):
    passed, lines = checked(name)
    assert not passed and promise in failed(lines)
    assert any(why in line for line in lines), lines


def test_what_is_no_function_is_refused(checked):
    for named, sentence in [("good", "takes MODULE:FUNCTION"), ("own_scores:CALLS", "is no function of")]:
        with pytest.raises(RunError, match=sentence):
            show_reward_check(named)


def test_every_objective_and_reward_is_listed_within_the_width():
    lines = [line.plain for line in objective_listing()]
    assert max(map(len, lines)) <= WIDTH
    named = {line.split()[0] for line in lines if line and not line.startswith(" ")}
    assert {kind.kind for kind in get_args(Objectives) + get_args(Rewards)} <= named
