"""Tokenizes conversations by the tokenizer's chat template and marks the assistant's tokens."""

import re
from typing import Any

from jinja2 import TemplateError

from engine.messages.errors import RunError
from engine.objectives.base import Tokenizer

Turns = list[dict[str, str]]
PLACEHOLDER = "\ue000"  # for private use: no template writes it


def encode_conversations(conversations: list[Turns], tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Returns each conversation's token ids, and a mask that is 1 on the assistant's tokens.

    If the template has {% generation %} marks, both equal those of TRL's SFTTrainer with `assistant_only_loss`.
    Otherwise an assistant's turn is the text that the template adds for it after the generation prompt. RunError if
    there is no template, or one that refuses a conversation or does not tell turns apart.
    """
    if not tokenizer.chat_template:
        raise RunError(
            "the rows are messages, but the tokenizer of model.base has no chat template: name a base that has one"
        )
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
            options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            marked = tokenizer.apply_chat_template(conversations, **options)
            return marked["input_ids"], marked["assistant_masks"]
        return _by_prefixes(conversations, tokenizer)
    except TemplateError as error:
        raise RunError(
            f"the chat template of model.base refuses a conversation ({error}): leave it out of the source, or name "
            f"another base"
        ) from None


def _by_prefixes(conversations: list[Turns], tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    def rendered(turns: Turns, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))

    ids, masks = [], []
    for turns in conversations:
        whole, spans = rendered(turns), []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            if number:
                before = rendered(turns[:number], add_generation_prompt=True)
            else:  # templates do not render an empty conversation
                before = rendered([turn | {"content": PLACEHOLDER}]).partition(PLACEHOLDER)[0]
            through = rendered(turns[: number + 1])
            if not (whole.startswith(through) and through.startswith(before)):
                raise RunError(
                    "the chat template of model.base writes the beginning of a conversation otherwise when more "
                    "follows, so that it does not say which tokens are the assistant's: give it {% generation %} marks"
                )
            spans.append((len(before), len(through)))
        tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids.append(tokens["input_ids"])
        # As in TRL's masks, a token that starts before a turn and reaches into it belongs to the turn.
        places = tokens["offset_mapping"]
        masks.append([int(any(start < to and end > since for since, to in spans)) for start, end in places])
    return ids, masks
