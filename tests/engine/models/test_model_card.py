"""What the model card says of a run, and what it keeps of the machine that ran it."""

from dataclasses import replace

import pytest

from engine.models.export import model_card

HOME = "/home/somebody/secret project"
STORE = {"clients": 10, "unseen_clients": 2}


@pytest.mark.parametrize(
    "source", [f"JsonlFiles(path='{HOME}/rows.jsonl')", f'TextFiles(path="file://{HOME}/rows.jsonl")']
)
def test_local_paths_are_not_published(small_recipe, source):
    recipe = small_recipe("strategy=fedavg")
    recipe = replace(recipe, model=replace(recipe.model, base=f"{HOME}/my-base"))
    card = model_card(recipe, {"loss": {"end": {"heldout": 1.5}}}, STORE | {"source": source}, merged=False)
    assert "secret" not in card and "base_model: my-base\n" in card and 'from_pretrained("my-base")' in card
    assert "rows.jsonl" in card and "| 1.5000 |" in card


def test_names_of_a_hub_stay_as_they_are(small_recipe):
    recipe = small_recipe("strategy=fedavg")
    recipe = replace(recipe, model=replace(recipe.model, base="org/base"))
    source = "HfDataset(path='org/rows', file='train/part.parquet')"
    card = model_card(recipe, {}, STORE | {"source": source}, merged=False)
    assert "base_model: org/base\n" in card and f"Data: {source}." in card


def test_what_is_measured_has_its_unit(small_recipe):
    recipe, accuracy = small_recipe("train.objective=dpo"), {"end": {"heldout": 0.75}}
    tables = {"loss": {"end": {"heldout": 0.5, "unseen": 0.6}}, "accuracy": accuracy}
    card = model_card(recipe, tables, STORE | {"source": "Jsonl()"}, merged=False)
    assert "| loss (per pair) | end |\n" in card and "| clients that never trained | 0.6000 |" in card
    assert "| accuracy (share) | end |\n|---|---|\n| held-out rows of training clients | 0.7500 |\n\n" in card
    assert "(objective `dpo`)" in card and "nats" not in card
