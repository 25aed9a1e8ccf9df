"""Where partitions stand in a recipe, one within another, and where their stores lie."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from engine.messages.errors import RunError
from experiments.config.recipe import Recipe, parse_recipe
from experiments.runs.api import build_store


def recipe_of(data: dict[str, Any]) -> Recipe:
    """The least recipe with this section."""
    least = {"name": "least", "seed": 1, "rounds": 2, "model": {}, "train": {"steps": 3}}
    return parse_recipe(tomli_w.dumps(least | {"data": data}))


def test_partitions_within_partitions_may_be_given_by_their_kind_alone() -> None:
    inner = {"kind": "combined", "first": "natural", "then": {"kind": "size_cap", "rows": 2}}
    combined = {"kind": "combined", "first": inner, "then": {"kind": "combined", "first": "natural", "then": "natural"}}
    recipe = recipe_of({"source": "python_docs", "partition": combined})
    assert recipe.data.partition.first.first == recipe.data.partition.then.then  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["first", "then", "then.first"])
def test_a_partition_within_a_partition_is_refused_where_it_stands(place: str) -> None:
    partition: dict[str, Any] = {"kind": "iid", "clients": 0}
    for part in reversed(place.split(".")):
        partition = {"kind": "combined", "first": "natural", "then": "natural"} | {part: partition}
    with pytest.raises(RunError, match=rf"^the recipe: data\.partition\.{place}\.clients is 0: ask for at least 1$"):
        recipe_of({"source": "python_docs", "partition": partition})


def test_the_cache_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"client": "a", "text": "b"}\n')
    recipe = recipe_of({"source": {"kind": "jsonl", "path": str(rows)}, "cache": "~/stores"})
    assert build_store(recipe).parent == tmp_path / "stores"
