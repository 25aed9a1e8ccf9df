"""Token columns on nodes that do not see their folder. One machine stands for two: the folder is taken away."""

import json
import shutil

import pytest

from datasets_partition.store.build import build
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.messages.broadcast import BroadcastMessage
from engine.messages.errors import RunError
from engine.messages.shards import Shard
from engine.models.tokenizer import load_tokenizer
from engine.scheduling.pool import Pool
from engine.workers import token_columns as rows
from engine.workers.token_columns import find_tokens, put_tokens, receive_tokens, token_columns
from experiments.config.recipe import located


@pytest.fixture
def made(small_recipe, tmp_path):
    """A store of its own, and the recipe."""
    recipe = located(small_recipe(f"data.cache='{tmp_path / 'stores'}'"))
    data = recipe.data
    return build(data.source, data.partition, data.splits, recipe.seed, data.cache), recipe


def test_they_are_made_once(made):
    store, recipe = made
    tokens = token_columns(store, recipe)
    assert tokens.parent == store and token_columns(store, recipe) == tokens == find_tokens(tokens)
    assert Tokens.open(tokens).counts("train").sum() > 0


@pytest.fixture
def spoken(small_recipe, tmp_path):
    """A store of conversations with tools and thoughts, and a recipe whose template writes both and the date."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "say"},
        {"role": "assistant", "content": "hm", "reasoning_content": "why", "weight": 0},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "d"}}]
    rows = [{"client": f"{n % 4}", "messages": [*turns, {"role": "tool", "content": f"{n}"}]} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"tools": tools}) + "\n" for row in rows))
    (tmp_path / "own.jinja").write_text(
        "{{ strftime_now('%Y') }}{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}"
        "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def make(*changes):
        source = f'data.source={{kind="jsonl", path="{tmp_path / "rows.jsonl"}"}}'
        cache = f"data.cache='{tmp_path / 'stores'}'"
        return located(small_recipe(source, cache, f"model.chat_template='{tmp_path / 'own.jinja'}'", *changes))

    recipe = make("train.max_length=400", "model.template_date='2020-02-03'")
    data = recipe.data
    return build(data.source, data.partition, data.splits, recipe.seed, data.cache), recipe, make


def test_conversations_with_tools_and_thoughts_are_encoded_from_their_store(spoken):
    store, recipe, _ = spoken
    tokens, tokenizer = Tokens.open(token_columns(store, recipe)), load_tokenizer(recipe.model)
    row = tokens.rows(0, "train").slice(0, 1).to_pylist()[0]
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith('2020[{"type": "function"') and "<assistant>whyhm<user>go<assistant>[{" in text
    learned = tokenizer.decode([token for token, bit in zip(row["input_ids"], row["mask"], strict=True) if bit])
    assert learned == '[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]'


def test_the_date_and_the_template_are_part_of_their_name(spoken, tmp_path):
    store, recipe, make = spoken
    first = token_columns(store, recipe)
    later = make("train.max_length=400", "model.template_date='2021-02-03'")
    assert token_columns(store, recipe) == first != token_columns(store, later)
    (tmp_path / "own.jinja").write_text("!" + (tmp_path / "own.jinja").read_text())
    assert token_columns(store, recipe) != first


def test_rows_that_the_objective_does_not_read_stay_in_the_store(small_recipe, tmp_path):
    rows = [{"client": f"{n % 4}", "prompt": "a", "chosen": f"b{n}", "rejected": f"c{n}"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f'data.source={{kind="jsonl", path="{tmp_path / "pairs.jsonl"}"}}'
    recipe = located(small_recipe(source, f"data.cache='{tmp_path / 'stores'}'"))
    data = recipe.data
    store = build(data.source, data.partition, data.splits, recipe.seed, data.cache)
    assert Store.open(store).read_rows(0, "train").column_names == ["client", "prompt", "chosen", "rejected"]
    with pytest.raises(
        RunError, match=r'^train\.objective = "sft" learns from .* but the rows are preference pairs \('
    ):
        token_columns(store, recipe)


def test_a_node_without_the_folder_gets_a_copy(made, ray_session, tmp_path, monkeypatch):
    store, recipe = made
    tokens = token_columns(store, recipe)
    monkeypatch.setattr(rows, "node_cache", lambda: tmp_path / "node")
    monkeypatch.setattr(rows, "PIECE_BYTES", 1000)
    expected, files = (
        Tokens.open(tokens).rows(3, "train").to_pydict(),
        {p.name: p.read_bytes() for p in tokens.iterdir()},
    )
    pieces = put_tokens(tokens)
    assert len(pieces["tokens.arrow"]) > 2
    shutil.rmtree(tokens)
    assert find_tokens(tokens) is None
    copy = receive_tokens(tokens, pieces)
    assert find_tokens(tokens) == copy == tmp_path / "node" / store.name / tokens.name
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == files
    assert Tokens.open(copy).rows(3, "train").to_pydict() == expected


def test_a_slot_that_does_not_see_them_works_on_its_copy(made, ray_session, monkeypatch, tmp_path):
    store, recipe = made
    slots = Pool.start(recipe, tmp_path / "client_state", store)
    try:
        tokens, initial = slots.columns.folder, BroadcastMessage(0, (Shard(slots.initial, {}),))
        slots.columns.pieces = put_tokens(tokens)
        tokens.rename(tmp_path / "aside")
        ray_session.kill(slots.actors[0])
        losses = slots.ask(lambda actor: actor.evaluate.remote([0, 1], initial, 4))
        assert [loss.client for loss in losses] == [0, 1]
        copy = ray_session.get(slots.actors[0].find_tokens.remote(tokens))
        assert copy is not None and copy != tokens
        shutil.rmtree(copy)
    finally:
        slots.stop()
