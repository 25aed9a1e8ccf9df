"""Token columns on nodes that do not see their folder. One machine stands for two: the folder is taken away."""

import shutil

import pytest

from datasets_partition.store.build import build
from datasets_partition.store.tokens import Tokens
from engine.messages.broadcast import BroadcastMessage
from engine.messages.shards import Shard
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
