"""Prompts with their completions and rewards, as rows: by hand, with functions and reward models that take notes."""

import copy
import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from datasets_partition.core.types import TURNS
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from engine.objectives.base import Context
from engine.objectives.reinforcement.grpo import Grpo
from engine.objectives.reinforcement.rewards import Custom, Exact, Length, RewardModel
from engine.objectives.reinforcement.samples import POLICY
from engine.objectives.sampling import Completion

PROMPTS = ["", "say the", "name a color: ", "one and two are "]


@pytest.fixture
def rows(tokenizer):
    def made(objective, prompts=PROMPTS, length=64, **columns):
        table = pa.table({"prompt": prompts, **columns})
        (batch,) = objective.encode(table, tokenizer, length).combine_chunks().to_batches()
        return batch

    return made


def answered(objective, tokenizer, rows, texts, *, training=True):
    """Completed rows whose samples are given texts."""
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    parts = [Completion(np.array(each), np.zeros(len(each), np.float32), True) for each in ids]
    return objective.completed(rows, parts, Context(tokenizer=tokenizer, training=training))


def test_failed_rewards_are_left_out_of_their_group_and_counted(tokenizer, rows):
    def fails(prompt, completion, row):
        return {"nan": math.nan, "raise": None}.get(completion) if completion != "raise" else row["missing"]

    rewards = (Length(target=4, unit="characters"), Custom("mine:fails", fails))
    objective = Grpo(rewards=rewards, num_generations=4, max_completion_length=9)
    texts = ["four", "two", "nan", "raise"]
    samples = answered(objective, tokenizer, rows(objective, ["a"]), texts)
    assert samples["scored"].to_pylist() == [[1, 1, 0, 0]] and samples["failed"].to_pylist() == [[0, 0, 1, 1]]
    assert samples["reward"].to_pylist() == [[1.0, 0.75, 0.0, 0.0]]
    batch = objective.collate(samples, 0)
    assert objective.counts(batch) | {POLICY: 0} == {
        POLICY: 0,
        **{"reward": 2, "length": 4, "ended": 4, "failed": 4, "signal": 1},
    }
    advantages = objective.advantages(objective._rewards(batch, torch.float64), batch)
    each = 0.125 / (math.sqrt(2 * 0.125**2) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[each, -each, 0, 0]]).double())
    with pytest.raises(RunError, match=r"fails for all completions, the first time with mine:fails: ValueError"):
        answered(objective, tokenizer, rows(objective, ["a"]), ["nan"] * 4)
    heldout = answered(objective, tokenizer, rows(objective, ["a"]), ["nan"] * 4, training=False)
    assert heldout["scored"].to_pylist() == [[0] * 4]


def test_rewards_see_their_prompt_and_the_columns_they_read(tokenizer, rows):
    seen = []

    def note(prompt, completion, row):
        seen.append((prompt, completion, row))
        return 1.0

    columns = {"completion": ["b", "d"], "level": [1, 2]}
    objective = Grpo(rewards=(Custom("mine:note", note), Exact()), num_generations=2, max_completion_length=4)
    samples = answered(objective, tokenizer, rows(objective, ["a", "c"], **columns), ["b", "x", "x", "d"])
    assert samples["reward"].to_pylist() == [[2, 1], [1, 2]]
    facts = {"completion_tokens": 2, "ended": True}
    assert seen[0] == ("a", "b", {"completion": "b", "level": 1, **facts})
    assert [(prompt, completion) for prompt, completion, _ in seen] == [("a", "b"), ("a", "x"), ("c", "x"), ("c", "d")]
    exact = Grpo(rewards=(Exact(),), num_generations=2)
    (row,) = [json.loads(bytes(text)) for text in rows(exact, ["a"], completion=["b"], level=[1])["row"].to_pylist()]
    assert row == {"prompt": "a", "options": None, "row": {"completion": "b"}}
    with pytest.raises(RunError, match=r"read the column 'completion', which the rows lack \(they are prompts alone\)"):
        rows(exact, ["a"])


def test_reward_models_score_all_completions_at_once_beside_functions(tokenizer, rows):
    rewards = (RewardModel(model="first", weight=0.5), Length(target=2, unit="characters"), RewardModel(model="second"))
    objective = Grpo(rewards=rewards, num_generations=2, max_completion_length=4)
    assert [(each.model, each.scores) for each in objective.models] == [("first", True), ("second", True)]
    moved = objective.with_models([FrozenModel("/a/first", base="/b"), FrozenModel("/a/second", "main")])
    assert moved.rewards[0] == RewardModel(model="/a/first", base="/b", weight=0.5) and moved.rewards[1] == rewards[1]
    assert moved.rewards[2] == RewardModel(model="/a/second", revision="main")
    calls = []

    def scorer(prompts, texts):
        calls.append((prompts, texts))
        return [float(len(text)) for text in texts]

    models = (scorer, lambda prompts, texts: [math.nan if text == "abc" else 1.0 for text in texts])
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("ab", "abc", "a", "")]
    parts = [Completion(np.array(each), np.zeros(len(each), np.float32), True) for each in ids]
    encoded = rows(objective, ["one", "two"])
    samples = objective.completed(encoded, parts, Context(tokenizer=tokenizer, models=models))
    assert calls == [(["one", "one", "two", "two"], ["ab", "abc", "a", ""])]
    assert samples["reward"].to_pylist() == [[1 + 1 + 1, 0], [0.5 + 0.5 + 1, 0 + 0 + 1]]
    assert samples["failed"].to_pylist() == [[0, 1], [0, 0]]


def test_turns_reach_rewards_and_reward_models(tokenizer, rows):
    turns = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "yo"}]]
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}> {% endif %}"
    spoken = copy.copy(tokenizer)
    spoken.chat_template = template
    seen, scored = [], []
    noting = Custom("mine:note", lambda prompt, completion, row: seen.append(prompt) or 1.0)
    objective = Grpo(rewards=(noting, RewardModel(model="m")), num_generations=2)
    table = pa.table({"prompt": pa.array(turns, TURNS)})
    (encoded,) = objective.encode(table, spoken, 96).to_batches()
    assert spoken.decode(encoded["input_ids"][1].as_py()) == "yo > "
    parts = [Completion(np.array([5]), np.zeros(1, np.float32), False)] * 4
    models = (lambda prompts, texts: [scored.append(prompt) or 1.0 for prompt in prompts],)
    objective.completed(encoded, parts, Context(tokenizer=spoken, models=models))
    assert seen == [turns[0]] * 2 + [turns[1]] * 2
    assert [each.turns for each in scored] == seen


def test_a_prompt_that_leaves_no_room_is_dropped(tokenizer, rows):
    objective = Grpo(rewards=(Exact(),), max_completion_length=8)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    limit = sorted(lengths)[2]
    answers = ["x"] * len(PROMPTS)
    kept = rows(objective, PROMPTS, length=limit + 8, completion=answers)["input_ids"].is_valid().to_pylist()
    assert kept == [length <= limit for length in lengths] and not all(kept)
    assert rows(objective, [""], completion=["x"])["input_ids"].to_pylist() == [[tokenizer.eos_token_id]]
