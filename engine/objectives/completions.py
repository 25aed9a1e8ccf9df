"""Tokenizes prompts with completions, as text or as turns, and finds where each completion starts."""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from datasets_partition.core.turns import Conversation, conversations
from engine.objectives.base import Tokenizer
from engine.objectives.chat_template import rendered_ids


class Completion(NamedTuple):
    """The token ids of a prompt with its completion, and how many of them the prompt alone begins with."""

    ids: list[int]
    prompt_tokens: int


def encode_completions(rows: pa.Table, name: str, tokenizer: Tokenizer) -> list[Completion]:
    """Tokenizes each row's prompt with the completion in the column `name`.

    Both are tokenized together, and the completion starts where the tokens first differ from those of the prompt alone.
    Text ends with the end token; turns end as the chat template ends them. All equals what TRL does.
    """
    if pa.types.is_nested(rows.schema.field("prompt").type):
        return _of_turns(conversations(rows, "prompt"), conversations(rows, name), tokenizer)
    return _of_texts(rows["prompt"].to_pylist(), rows[name].to_pylist(), tokenizer)


def _of_texts(prompts: list[str], completions: list[str], tokenizer: Tokenizer) -> list[Completion]:
    texts = [prompt + ended(completion, tokenizer) for prompt, completion in zip(prompts, completions, strict=True)]
    prompt_ids, ids = tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"]
    return [Completion(whole, common_start(prompt, whole)) for prompt, whole in zip(prompt_ids, ids, strict=True)]


def _of_turns(prompts: list[Conversation], completions: list[Conversation], tokenizer: Tokenizer) -> list[Completion]:
    encoded = []
    for (prompt, _, options), (completion, _, _) in zip(prompts, completions, strict=True):
        before = rendered_ids(tokenizer, prompt, options, add_generation_prompt=True)
        whole = rendered_ids(tokenizer, [*prompt, *completion], options)
        encoded.append(Completion(whole, common_start(before, whole)))
    return encoded


def ended(text: str, tokenizer: Tokenizer) -> str:
    """Returns a text that ends with the end token."""
    end: str = tokenizer.eos_token
    return text if text.endswith(end) else text + end


def common_start(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """Returns how many tokens both begin with."""
    return next(
        (i for i, (p, t) in enumerate(zip(prompt, whole, strict=False)) if p != t), min(len(prompt), len(whole))
    )
