"""Variants of a recipe: how tables are merged, and what is refused before anything runs."""

import pytest

from engine.messages.errors import RunError
from experiments.config.recipe import load_recipe
from experiments.sweep.variants import load_variants, merged

TEXT = """
name = "both"
seed = 1
rounds = 2
[model]
base = "tiny"
[data]
source = "python_docs"
[train]
steps = 3
optimizer = { kind = "adamw", lr = 1e-3 }
[sweep.variants.plain]
[sweep.variants.other]
strategy = { kind = "fedprox", mu = 0.5 }
train.optimizer.lr = 0.5
[sweep.variants.third]
rounds = 5
train.optimizer = { kind = "sgd", lr = 0.25 }
"""


@pytest.fixture
def file(tmp_path):
    def made(text=TEXT):
        path = tmp_path / "both.toml"
        path.write_text(text)
        return path

    return made


def test_tables_are_merged_unless_their_kind_changes():
    tree = {"a": {"kind": "x", "one": 1, "two": 2}, "b": {"c": {"d": 1}}, "s": "fedavg"}
    assert merged(tree, {"a": {"one": 5}}) == {**tree, "a": {"kind": "x", "one": 5, "two": 2}}
    assert merged(tree, {"a": {"kind": "x", "one": 5}})["a"] == {"kind": "x", "one": 5, "two": 2}
    assert merged(tree, {"a": {"kind": "y", "one": 5}})["a"] == {"kind": "y", "one": 5}
    assert merged(tree, {"b": {"c": {"e": 2}}})["b"] == {"c": {"d": 1, "e": 2}}
    assert merged(tree, {"s": {"lr": 0.5}})["s"] == {"kind": "fedavg", "lr": 0.5}
    assert merged(tree, {"s": {"kind": "fedprox"}})["s"] == {"kind": "fedprox"}
    assert tree["a"]["one"] == 1  # the first is as it was


def test_each_variant_is_a_recipe(file):
    recipes = load_variants(file(), ["seed=9"])
    assert [*recipes] == ["plain", "other", "third"]
    assert {recipe.seed for recipe in recipes.values()} == {9}
    assert recipes["plain"].train.optimizer.lr == 1e-3 and recipes["plain"].name == "both-plain"
    assert recipes["other"].strategy.mu == 0.5 and recipes["other"].train.optimizer.lr == 0.5
    assert recipes["third"].rounds == 5 and recipes["third"].train.optimizer.kind == "sgd"
    assert [*load_variants(file(), only=["third"])] == ["third"]


def test_mistakes_of_variants_are_named_all_at_once(file):
    text = TEXT.replace("mu = 0.5", "nu = 0.5").replace("rounds = 5", "rounds = 0")
    with pytest.raises(RunError) as refused:
        load_variants(file(text))
    first, second = str(refused.value).splitlines()
    assert "the variant 'other'" in first and "nu" in first
    assert "the variant 'third'" in second and "rounds must be at least 1" in second


@pytest.mark.parametrize(
    ("text", "only", "what"),
    [
        (TEXT.partition("[sweep")[0], (), "has no [sweep.variants.NAME] tables"),
        (TEXT, ("fourth",), "has no variant 'fourth'; it has plain, other, third"),
        (TEXT + "[sweep.grid]\nx = 1\n", (), "[sweep] takes variants, not 'grid'"),
        (TEXT + '[sweep.variants."a/b"]\n', (), "the variant 'a/b' becomes a folder"),
    ],
)
def test_what_is_no_sweep_is_refused(file, text, only, what):
    with pytest.raises(RunError) as refused:
        load_variants(file(text), only=only)
    assert what in str(refused.value)


def test_a_run_of_a_sweep_names_the_command(file):
    with pytest.raises(RunError, match="several runs from one recipe: run it with `fedpost access`"):
        load_recipe(file())
