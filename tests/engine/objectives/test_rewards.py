"""Rewards by hand, and what becomes of one that fails."""

import math

import numpy as np
import pytest
import torch

from engine.messages.errors import RunError
from engine.objectives.reinforcement.rewards import (
    Balance,
    Contains,
    Custom,
    Exact,
    Length,
    Math,
    Number,
    Regex,
    Repetition,
    Words,
    score,
)

ROW = {"completion": " The answer is 42. ", "completion_tokens": 9, "ended": True}


@pytest.mark.parametrize(
    ("reward", "completion", "expected"),
    [
        (Exact(), "The answer is 42.", 1),
        (Exact(), "the answer is 42.", 0),
        (Exact(ignore_case=True), "the answer is 42.", 1),
        (Contains(text="42"), "It is 42", 1),
        (Contains(text="It"), "it is 42", 0),
        (Contains(text="IT", ignore_case=True), "it is 42", 1),
        (Regex(pattern=r"\d+"), "It is 42", 1),
        (Regex(pattern=r"\d+", whole=True), "It is 42", 0),
        (Number(), "6 times 7 is 42", 1),
        (Number(), "41.9", 0),
        (Number(tolerance=0.2), "41.9", 1),
        (Number(), "no number", 0),
        (Math(), r"\boxed{\frac{84}{2}}", 1),
        (Math(), "41", 0),
        (Length(target=5), "one two three four five", 1),
        (Length(target=5), "one two three", 0.6),
        (Length(target=5), "a b c d e f g h i j k l", 0),
        (Length(target=5), "", 0),
        (Length(target=4, unit="characters"), " abc ", 0.75),
        (Length(target=2, unit="sentences"), "One is 3.5. Two! And", 0.5),
        (Length(target=10, unit="tokens"), "whatever", 0.9),
        (Words(words=("the", "of")), "The end of it, the", 0.6),
        (Words(words=("the",)), "...", 0),
        (Balance(), "f(a[0], {1})", 1),
        (Balance(), "f(a]", 0),
        (Balance(), "(()", 2 / 3),
        (Balance(), "none", 1),
        (Repetition(n=1), "a b a b", 0.5),
        (Repetition(), "a b c a b c a b c", 3 / 7),
        (Repetition(), "a b", 1),
    ],
)
def test_rewards_by_hand(reward, completion, expected):
    assert reward.score("prompt", completion, ROW) == pytest.approx(expected)


def test_a_reward_does_not_apply_without_an_answer_to_compare_with():
    assert Number().score("", "5", {"completion": "five"}) is None
    assert Math().score("", "5", {"completion": ""}) is None


def custom(function, weight=1.0):
    return Custom("mine:f", function, weight)


def test_the_sum_is_weighted_and_leaves_out_what_does_not_apply():
    rewards = [Length(target=2), custom(lambda *_: None), custom(lambda *_: np.float32(0.5), weight=-2.0)]
    result = score(rewards, "", "one", ROW)
    assert result == (0.5 - 1.0, (0.5, None, 0.5), None)
    assert score([custom(lambda *_: None)], "", "one", ROW) == (None, (None,), None)
    assert score([custom(lambda *_: True)], "", "one", ROW).total == 1


def raises(prompt, completion, row):
    raise KeyError("missing\nand more")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (raises, "KeyError"),
        (lambda *_: math.nan, "ValueError: it returned nan"),
        (lambda *_: math.inf, "ValueError: it returned inf"),
        (lambda *_: "1", "TypeError: it returned a str"),
        (lambda *_: torch.tensor(1.0), "TypeError: it returned a Tensor"),
        (lambda *_: [1.0], "TypeError: it returned a list"),
        (lambda prompt: 1.0, "TypeError"),
    ],
)
def test_a_failed_reward_leaves_no_sum_and_says_why(function, why):
    result = score([Length(target=1), custom(function)], "", "one", ROW)
    assert result.total is None and result.each == (1.0, None)
    assert result.failure.startswith(f"mine:f: {why}") and "\n" not in result.failure


def test_a_sum_that_is_not_finite_is_a_failure():
    assert score([custom(lambda *_: 1e308, weight=10.0)], "", "", ROW).total is None


def test_a_function_cannot_change_the_row_of_others():
    row = dict(ROW)
    score([custom(lambda prompt, completion, row: row.clear())], "", "", row)
    assert row == ROW


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Regex(pattern="("), "is no regular expression"),
        (lambda: Contains(text=""), "needs a text"),
        (lambda: Words(words=()), "needs at least one word"),
        (lambda: Length(target=0), "target must be at least 1"),
        (lambda: Repetition(n=0), "n must be at least 1"),
        (lambda: Number(tolerance=-1.0), "tolerance must be at least 0"),
    ],
)
def test_senseless_options_are_refused(make, sentence):
    with pytest.raises(RunError, match=sentence):
        make()
