"""The comparison of levels: figures from runs, the table, the page, and what cannot be compared."""

import io
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from engine.messages.errors import RunError
from engine.records.metrics import loss_table
from experiments.access import compare as comparison
from experiments.access.alone import score_alone
from experiments.access.compare import client_memory, compare, refuse_unlike
from experiments.access.measured import Measured
from experiments.access.page import panel, show_table, write_page
from experiments.access.pictures import bubbles
from experiments.config.recipe import RECIPES
from experiments.openness.card import Card
from experiments.runs.api import build_store
from experiments.sweep.variants import load_variants

LORA = Measured(
    *("lora", "weights", "open weights", "fedavg", "lora", 4, {"unseen": 4.9}, {"unseen": 3.2, "heldout": 3.3}),
    *(4000.0, 2000.0, 0, 0, 500, 0, None, None, 100, 100, 12.0, 1e8, True, 3.2, ()),
)
WORDS = replace(
    LORA,
    **{"name": "words", "level": "api_logprobs", "box": "black box", "strategy": "words", "kind": "words"},
    **{"after": {"unseen": 4.5}, "up": 72.0, "rows": 900, "distinct": 100, "tokens": 20_000, "cost": 0.5},
    **{"currency": "USD", "alone": None, "lost": ("inject", "weights"), "backward": 0},
)


def test_the_table_says_what_each_level_costs(capsys):
    show_table([LORA, WORDS])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "900" in shown and "0.50 USD" in shown and "none" in shown
    assert WORDS.share == 0.2 and LORA.columns()["unseen_after"] == 3.2


def test_the_panel_measures_each_cell_or_says_that_it_cannot():
    rows = {row[0]: row[1:] for row in panel([LORA, WORDS], None, (2, 30))}
    assert "open weights: 0% of training rows" in rows["model weights"][0]
    assert "black box: 20% of training rows" in rows["model weights"][0]
    assert "black box: nothing is left without the owner" in rows["model weights"][1]
    assert "without the owner 3.200 is left" in rows["model weights"][1]
    assert "inject, weights lost" in rows["architecture and code"][1]
    assert rows["licence"][2] == "2 clients with 30 rows refuse"
    assert "cannot be checked" in rows["pre-training data"][0]
    others = {row[0]: row[1:] for row in panel([LORA], Card("x", {}, corpus="open"), (0, 0))}
    assert "open; not checked here" in others["pre-training data"][0]


def test_the_page_is_whole_and_escapes(tmp_path):
    page = tmp_path / "access.html"
    write_page("<b>levels", [LORA, WORDS], None, (0, 0), page, {"cma": "it <failed>"})
    text = page.read_text()
    assert "&lt;b&gt;levels" in text and "it &lt;failed&gt;" in text and "<script" not in text
    assert text.count("<svg") == 2 and text.count("<circle") == 3  # over cost there is one run alone
    assert "no data" in bubbles("t", [replace(LORA, after={})], [0.0], "x", "y")


def test_runs_of_other_rows_are_not_compared(small_recipe):
    first = small_recipe()
    refuse_unlike({"a": first, "b": replace(first, rounds=9)})
    for other, what in (
        (replace(first, seed=6), "differ in seed"),
        (replace(first, evaluate=replace(first.evaluate, rows=3)), "differ in evaluate"),
        (replace(first, cohort=replace(first.cohort, size=3)), "differ in cohort"),
        (replace(first, model=replace(first.model, base="tiny")), "have other bases"),
    ):
        with pytest.raises(RunError, match=what):
            refuse_unlike({"a": first, "b": other})


def test_levels_are_compared_on_real_runs(ray_session, small_recipe, tiny_base, rows_file, tmp_path, full, capsys):
    if not full:
        pytest.skip("takes long: its parts are tried by themselves")
    recipe = tmp_path / "levels.toml"
    recipe.write_text(f"""
name = "levels"
seed = 5
rounds = 2
cohort.size = 4
model.base = "{tiny_base}"
train = {{ steps = 1, batch = 4, max_length = 48 }}
evaluate = {{ every = 0, rows = 4, samples = 0 }}
clients.slots = 1
[data]
source = {{ kind = "jsonl", path = "{rows_file}" }}
splits = {{ heldout = 0.25, unseen = 0.2 }}
cache = "{tmp_path / "stores"}"
[sweep.variants.lora]
[sweep.variants.words]
model.peft = {{ kind = "words", n = 2 }}
model.access = {{ level = "api_logprobs", price = {{ input = 1.0, output = 1.0 }} }}
""")
    folder = compare(recipe, None, (), tmp_path / "out", lambda name, recipe: lambda event: None, None)
    rows = {row["name"]: row for row in pq.read_table(folder / comparison.TABLE).to_pylist()}
    assert rows["lora"]["rows"] == 0 and rows["words"]["rows"] == 17 * 4 * 4 * 2 and rows["words"]["cost"] > 0
    assert rows["words"]["distinct"] <= rows["words"]["training_rows"]
    assert rows["words"]["alone"] is None
    # What clients of open weights hold scores the same without anybody, to the bit.
    its = load_variants(recipe)["lora"]
    unseen = loss_table(folder / "lora" / "metrics", 2)["end"]["unseen"]
    assert rows["lora"]["alone"] == unseen == score_alone(its, folder / "lora", build_store(its))
    assert (folder / comparison.PAGE).is_file() and io.StringIO(capsys.readouterr().out)


def test_a_client_without_the_base_needs_little_memory():
    variants = load_variants(RECIPES / "access.toml", only=("lora", "ends", "words", "cma"))
    lora, ends, cma, words = client_memory([variants[name] for name in ("lora", "ends", "cma", "words")])
    assert words < cma < 1e6 < 1e8 < ends and lora > 1e8
