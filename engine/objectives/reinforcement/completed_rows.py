"""Rows of prompts, and what they become with sampled completions and rewards. Legend: P rows, G samples of each."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from datasets_partition.core.turns import Conversation, conversations
from datasets_partition.core.types import OPTIONS
from engine.messages.errors import RunError
from engine.objectives.base import Context, Prompt, Tokenizer
from engine.objectives.chat_template import rendered_ids
from engine.objectives.reinforcement.policy_gradient import deviations, has_others
from engine.objectives.reinforcement.rewards import Reward, RewardModel, Scored, score
from engine.objectives.sampling import Completions
from engine.objectives.token_batch import flattened

GIVEN = "row"  # the column of encoded rows that rewards are given: JSON text as bytes
# Columns of completed rows, beside the token ids `sample0_ids`, ... and log-probabilities `sampled0`, ... of each.
PROMPT, TEXT = "prompt_tokens", "text"
REWARD, SCORED, ENDED, FAILED, SIZE = OF_SAMPLES = ("reward", "scored", "ended", "failed", "size")
# The same for all rows of a step: its rewards' standard deviation, and how many have others in their group.
SPREAD, COUNT = "spread", "count"
SAMPLED = "sampled"


def prompt_rows(rows: pa.Table, reads: Sequence[str] | None, tokenizer: Tokenizer, room: int) -> pa.Table:
    """Makes `input_ids` of the prompts, null above `room` tokens, and what rewards are given: prompt and columns.

    `reads` are the columns that rewards read; None: all. An empty prompt becomes an end token.
    """
    prompts, ids = _prompts(rows, tokenizer)
    names = [name for name in rows.column_names if name not in ("prompt", OPTIONS)]
    columns = rows.select(names if reads is None else reads).to_pylist() or [{}] * rows.num_rows
    options = rows[OPTIONS].to_pylist() if OPTIONS in rows.column_names else [None] * rows.num_rows
    texts = [
        json.dumps({"prompt": prompt, "options": option, "row": row}, default=str).encode()
        for prompt, option, row in zip(prompts, options, columns, strict=True)
    ]
    given = pa.array([np.frombuffer(text, np.uint8) for text in texts], pa.list_(pa.uint8()))
    kept = pa.array([each if len(each) <= room else None for each in ids], pa.list_(pa.int32()))
    return pa.table({"input_ids": kept, GIVEN: given})


def _prompts(rows: pa.Table, tokenizer: Tokenizer) -> tuple[list[Any], list[list[int]]]:
    """Returns the prompts as rewards take them, text or turns, and their token ids."""
    if pa.types.is_nested(rows.schema.field("prompt").type):
        turns = conversations(rows, "prompt")
        ids = [rendered_ids(tokenizer, each.turns, each.options, add_generation_prompt=True) for each in turns]
        return [each.turns for each in turns], ids
    texts = rows["prompt"].to_pylist()
    ids = tokenizer(texts)["input_ids"] if texts else []
    return texts, [each or [tokenizer.eos_token_id] for each in ids]


def completed_rows(
    rows: pa.RecordBatch, completions: Completions, rewards: Sequence[Reward], context: Context
) -> pa.RecordBatch:
    """Adds to a step's prompts their completions, in columns for each sample, and the rewards of these.

    RunError if rewards fail for all of them in training: the client could learn nothing.
    """
    assert context.tokenizer is not None
    group, ids = len(completions) // max(1, rows.num_rows), [completion.ids.tolist() for completion in completions]
    texts = context.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    scores = _scores(rows, completions, texts, rewards, context.models)
    failures = [scored.failure for scored in scores if scored.failure is not None]
    if context.training and failures and len(failures) == len(scores):
        raise RunError(f"a reward fails for all completions, the first time with {failures[0]}")
    rewards_PG = np.array([math.nan if each.total is None else each.total for each in scores]).reshape(-1, group)
    of_samples = {
        REWARD: np.nan_to_num(rewards_PG),
        SCORED: ~np.isnan(rewards_PG),
        ENDED: [completion.ended for completion in completions],
        FAILED: [scored.failure is not None for scored in scores],
        SIZE: [len(completion.ids) for completion in completions],
    }
    given = torch.from_numpy(rewards_PG)
    of_step = {SPREAD: deviations(given.reshape(1, -1)).item(), COUNT: float(has_others(given).sum())}
    prompts = rows["input_ids"].to_pylist()
    made: dict[str, Any] = {PROMPT: pa.array([len(prompt) for prompt in prompts], pa.int32())}
    for g in range(group):
        its = completions[g::group]
        sequences = [prompt + completion.ids.tolist() for prompt, completion in zip(prompts, its, strict=True)]
        made[f"sample{g}_ids"] = pa.array(sequences, pa.list_(pa.int32()))
        made[f"{SAMPLED}{g}"] = pa.array([completion.logprobs for completion in its], pa.list_(pa.float32()))
    for name, values in of_samples.items():
        made[name] = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(values, np.float64).ravel()), group)
    made |= {name: pa.array([value] * len(prompts)) for name, value in of_step.items()}
    made[TEXT] = pa.FixedSizeListArray.from_arrays(pa.array(texts, pa.string()), group)
    return pa.RecordBatch.from_pydict(made)


def _scores(
    rows: pa.RecordBatch, completions: Completions, texts: list[str], rewards: Sequence[Reward], models: Sequence[Any]
) -> list[Scored]:
    """Computes the rewards of each completion; reward models score all of them at once."""
    group = len(completions) // rows.num_rows
    given = [json.loads(bytes(text)) for text in rows[GIVEN].to_pylist() for _ in range(group)]
    prompts = [prompt_of(each["prompt"], each["options"]) for each in given]
    named = [reward.model for reward in rewards if isinstance(reward, RewardModel)]
    by_models = {name: scorer(prompts, texts) for name, scorer in zip(named, models, strict=True)}
    scores = []
    for place, (each, text, completion) in enumerate(zip(given, texts, completions, strict=True)):
        facts = {"completion_tokens": len(completion.ids), "ended": completion.ended}
        by_model = {"scores": {name: values[place] for name, values in by_models.items()}} if by_models else {}
        scores.append(score(rewards, each["prompt"], text, {**each["row"], **facts, **by_model}))
    return scores


def prompt_of(prompt: Any, options: str | None) -> Prompt:
    """Returns a prompt that rewards are given as templates take it."""
    if isinstance(prompt, str):
        return prompt
    return Conversation(prompt, [True] * len(prompt), json.loads(options or "{}"))


def by_sample(rows: pa.RecordBatch, name: str) -> list[np.ndarray]:
    """Returns the lists of the columns `name` with the number of each sample in place of {}, a row after another."""
    names = [name.format(g) for g in range(rows[REWARD].type.list_size)]
    columns = [np.split(flattened(rows[each]), np.diff(rows[each].offsets).cumsum()[:-1]) for each in names]
    return [sample for row in zip(*columns, strict=True) for sample in row]


def values_of(rows: pa.RecordBatch, name: str) -> np.ndarray:
    """Returns a column's values of all samples (P G,)."""
    values: np.ndarray = rows[name].flatten().to_numpy()
    return values
