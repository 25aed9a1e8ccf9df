"""Whatever is given as a recipe is a recipe or a RunError, and nothing else."""

import copy
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from engine.messages.errors import RunError
from experiments.config.recipe import RECIPES, parse_recipe, to_toml

LEAST: dict[str, Any] = {
    "name": "least",
    "seed": 1,
    "rounds": 2,
    "model": {},
    "data": {"source": "python_docs"},
    "train": {"steps": 3},
}


def survives(text: str, changes: list[str]) -> None:
    """A recipe that parses can be written and read again; one that does not is a RunError, and nothing else."""
    try:
        recipe = parse_recipe(text, changes)
    except RunError as error:
        assert str(error)
    else:
        assert to_toml(parse_recipe(to_toml(recipe))) == to_toml(recipe)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "9" * 5000, "1e999", "2024-05-01"])
@pytest.mark.parametrize("key", ["train.clip", "train.optimizer.lr", "model.peft.alpha", "strategy.lr", "seed"])
def test_odd_numbers(key: str, value: str) -> None:
    kinds = {"model": {"peft": "lora"}, "train": {"steps": 1, "optimizer": "sgd"}, "strategy": "fedavg"}
    survives(tomli_w.dumps(LEAST | kinds), [f"{key}={value}"])


def test_deep_nesting_is_an_error_too() -> None:
    survives("name = " + "[" * 5000, [])
    survives(tomli_w.dumps(LEAST), ["train." * 3000 + "steps=1"])


def tried(cases: int, given_: SearchStrategy[Any], test: Callable[[Any], None]) -> None:
    """Tries so many inputs."""
    settings(deadline=None, max_examples=cases, suppress_health_check=list(HealthCheck))(given(given_)(test))()


@pytest.mark.slow
def test_any_text_is_a_recipe_or_an_error(full: bool) -> None:
    tried(500 if full else 100, st.text(), lambda text: survives(text, []))


@pytest.mark.slow
def test_any_change_is_made_or_an_error(full: bool) -> None:
    def change(text: str) -> None:
        survives(tomli_w.dumps(LEAST), [text])
        survives(tomli_w.dumps(LEAST), [f"train.optimizer.{text}"])

    tried(1000 if full else 100, st.text(), change)


WORDS = st.text(max_size=4) | st.sampled_from(["sgd", "none", "jsonl"])
SCALARS = st.one_of(st.integers(), st.floats(), st.booleans(), WORDS, st.dates())
KEYS = st.sampled_from(["kind", "lr", "path", "r", "targets", "size", "mode", "betas", "weighting", "x"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)
RESOLVED = tomllib.loads(to_toml(parse_recipe(tomli_w.dumps(LEAST))))
PLACES = [(key,) for key in RESOLVED] + [
    (key, inner) for key, section in RESOLVED.items() if isinstance(section, dict) for inner in section
]


@pytest.mark.slow
def test_any_value_anywhere_is_taken_or_an_error(full: bool) -> None:
    def change(changes: list[tuple[tuple[str, ...], Any]]) -> None:
        tree = copy.deepcopy(RESOLVED)
        for (*path, last), value in changes:
            table: Any = tree
            for part in path:
                table = table[part]
            if isinstance(table, dict):
                table[last] = value
        survives(tomli_w.dumps(tree), [])

    places = st.tuples(st.sampled_from(PLACES), VALUES)
    tried(4000 if full else 300, st.lists(places, min_size=1, max_size=2), change)


@pytest.mark.slow
def test_a_shipped_recipe_with_other_bytes_is_a_recipe_or_an_error(full: bool) -> None:
    shipped = [path.read_text() for path in sorted(RECIPES.glob("*.toml"))]

    def spoil(case: tuple[str, list[tuple[int, int, str]]]) -> None:
        text, edits = case
        for at, length, put in edits:
            text = text[: at % len(text)] + put + text[at % len(text) + length :] if text else put
        survives(text, [])

    edit = st.tuples(
        st.integers(0, 2000), st.integers(0, 9), st.text(max_size=3) | st.sampled_from(list('[]{}=."\n9-'))
    )
    tried(1500 if full else 100, st.tuples(st.sampled_from(shipped), st.lists(edit, min_size=1, max_size=4)), spoil)


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        ("[{}]", r"'transforms\.0' needs a kind: 'clip' or 'topk'"),
        ("[{kind='topk'}, {kind='int9'}]", r"'transforms\.1' has no kind 'int9'; did you mean 'int8'\?"),
        ("[{kind='topk', shrae=0.1}]", r"there is no key 'transforms\.0\.shrae'; did you mean 'share'\?"),
        ("[{kind='topk', share='much'}]", r"'transforms\.0\.share' should be a valid number, not 'much'"),
        ("{kind='topk'}", r"'transforms' should be"),
    ],
)
def test_faults_in_a_list_of_sections_name_the_place(transforms: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        parse_recipe(tomli_w.dumps(LEAST), [f"transforms={transforms}"])
