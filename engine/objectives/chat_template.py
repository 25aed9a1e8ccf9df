"""Tokenizes conversations by the tokenizer's chat template and marks the assistant's tokens."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets_partition.core.turns import Conversation
from engine.messages.errors import RunError
from engine.objectives.base import Tokenizer
from engine.objectives.templates import KEY, training_twin, undated

Turn = dict[str, Any]
Span = tuple[int, int]  # of characters
Encoded = tuple[list[int], list[int]]  # a row's token ids and mask
Render = Callable[..., str]
PLACEHOLDER = "\ue000"  # for private use: no template writes it
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers gives templates each under the other's name
# Arguments of apply_chat_template itself.
NOT_THE_TEMPLATES = {"conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
NOT_THE_TEMPLATES |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
NOT_THE_TEMPLATES |= {"return_assistant_tokens_mask", "sanitize_control_tokens", "conversations", "messages"}
THOUGHTS_END = "</think>"
WORDS = {"content": "content", "thoughts": f"words before {THOUGHTS_END} in the content"}


def encode_conversations(
    conversations: list[Conversation], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns each conversation's token ids, and a mask that is 1 on the tokens of the assistant's learned turns.

    If the template has {% generation %} marks, both equal those of TRL's SFTTrainer with `assistant_only_loss`.
    Otherwise an assistant's turn is the text that the template adds for it after the generation prompt. RunError if
    there is no template, or one that refuses a conversation, leaves a part of it out, or does not tell turns apart.
    """
    _require_template(tokenizer)
    shapes: set[str] = set()
    for conversation in conversations:
        # Whether a template writes a part follows from what there is, and hardly ever from the words.
        if (shape := _shape(conversation)) not in shapes:
            shapes.add(shape)
            _require_all_written(conversation, tokenizer)
    encoded: dict[int, Encoded] = {}
    plain = [
        number
        for number, (turns, learned, options) in enumerate(conversations)
        if not options and all(learned) and GENERATION.search(tokenizer.get_chat_template())
    ]
    if plain:  # a tokenizer is faster with many texts at once
        marked = _marked([conversations[number].turns for number in plain], tokenizer, {})
        encoded |= dict(zip(plain, marked, strict=True))
    for number, conversation in enumerate(conversations):
        if number not in encoded:
            has_marks = GENERATION.search(tokenizer.get_chat_template(tools=conversation.options.get("tools")))
            encoded[number] = (_by_marks if has_marks else _by_prefixes)(conversation, tokenizer)
    rows = [encoded[number] for number in range(len(conversations))]
    return [ids for ids, _ in rows], [mask for _, mask in rows]


def learned_turns(conversation: Conversation) -> list[bool]:
    """Returns for each turn whether it is an assistant's that is to be learned."""
    pairs = zip(conversation.turns, conversation.learned, strict=True)
    return [turn["role"] == "assistant" and learned for turn, learned in pairs]


def _require_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise RunError(
            f"the rows are conversations, but the tokenizer of model.base has no chat template: name a base that has "
            f"one, or a template in {KEY}"
        )
    if isinstance(named := tokenizer.chat_template, dict) and "default" not in named:
        raise RunError(
            f"the tokenizer of model.base has chat templates named {', '.join(sorted(named))}, none of them "
            f'"default": name one in {KEY}'
        )


def _rendered(tokenizer: Tokenizer, turns: Sequence[Any], options: dict[str, Any], **more: Any) -> Any:
    """What the template makes of turns; RunError for whatever it raises."""
    try:
        return tokenizer.apply_chat_template(list(turns), **(options | {"tokenize": False} | more))
    except Exception as error:  # a template is a stranger's program
        raise RunError(
            f"the chat template of model.base refuses a conversation ({_said(error)}): leave it out of the source, or "
            f"name another template in {KEY}"
        ) from None


def rendered_ids(tokenizer: Tokenizer, turns: Sequence[Any], options: dict[str, Any], **more: Any) -> list[int]:
    """Returns the token ids of turns as the chat template writes them; RunError if it cannot."""
    _require_template(tokenizer)
    ids: list[int] = _rendered(tokenizer, turns, options, tokenize=True, return_dict=True, **more)["input_ids"]
    return ids


def _said(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return text if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {text}"


def _marked(conversations: list[list[Turn]], tokenizer: Tokenizer, options: dict[str, Any]) -> list[Encoded]:
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    marked = _rendered(tokenizer, conversations, options, **how)
    return list(zip(marked["input_ids"], marked["assistant_masks"], strict=True))


def _by_marks(conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
    turns, learned, options = conversation
    if all(learned):
        return _marked([turns], tokenizer, options)[0]
    from transformers.utils.chat_template_utils import render_jinja_template

    assistants = [learn for turn, learn in zip(turns, learned, strict=True) if turn["role"] == "assistant"]
    (whole,), (spans,) = render_jinja_template(
        conversations=[_without_nulls(turns)],
        chat_template=tokenizer.get_chat_template(tools=options.get("tools")),
        return_assistant_tokens_mask=True,
        **(tokenizer.special_tokens_map | options),
    )
    if len(spans) != len(assistants):
        raise RunError(
            f"the chat template of model.base marks {len(spans)} parts of a conversation in which the assistant has "
            f"{len(assistants)} turns, so that it does not say which are not to be learned (weight 0, or part of a "
            f"prompt): leave such conversations out of the source, or name another template in {KEY}"
        )
    return _masked(whole, [span for span, learn in zip(spans, assistants, strict=True) if learn], tokenizer)


def _without_nulls(turns: Sequence[Turn]) -> list[Turn]:
    """The turns as apply_chat_template gives them to the template."""
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def _by_prefixes(conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
    turns, options = conversation.turns, conversation.options
    whole, spans = _rendered(tokenizer, turns, options), []
    for number, learned in enumerate(learned_turns(conversation)):
        if not learned:
            continue
        if number:
            before = _rendered(tokenizer, turns[:number], options, add_generation_prompt=True)
        else:  # templates do not render an empty conversation
            before = _head(turns[0], tokenizer, options)
        through = _rendered(tokenizer, turns[: number + 1], options)
        for beginning, text, writes in (
            (before, through, "an assistant's turn otherwise than its generation prompt begins it"),
            (through, whole, "the beginning of a conversation otherwise when more follows"),
        ):
            if not text.startswith(beginning):
                twin = training_twin(_template(tokenizer, options))
                raise RunError(
                    f"the chat template of model.base writes {writes}, so that it does not say which tokens are the "
                    f"assistant's: name a template that has {{% generation %}} marks in {KEY}{_such_as(twin)}"
                )
        spans.append((len(before), len(through)))
    return _masked(whole, spans, tokenizer)


def _head(turn: Turn, tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    """What the template writes before the words of an assistant that speaks first."""
    user = [{"role": "user", "content": PLACEHOLDER}]
    head: str = _rendered(tokenizer, [turn | {"content": PLACEHOLDER}], options).partition(PLACEHOLDER)[0]
    try:
        asked, plain = (_rendered(tokenizer, user, options, add_generation_prompt=ask) for ask in (True, False))
    except RunError:
        return head
    # After the generation prompt a template may write words that the assistant would have to, such as empty thoughts.
    prompt = asked.removeprefix(plain) if asked.startswith(plain) else ""
    before, header, _ = head.rpartition(prompt) if prompt else (head, "", "")
    return before + header if header else head


def _template(tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    return str(undated(tokenizer.get_chat_template(tools=options.get("tools"))))


def _such_as(twin: Path | None) -> str:
    return f', such as "{twin.stem}", which trl ships' if twin else ""


def _masked(whole: str, spans: list[Span], tokenizer: Tokenizer) -> Encoded:
    """The ids of a text, and 1 for those in one of the spans."""
    tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    # As in TRL's masks, a token that starts before a turn and reaches into it belongs to the turn.
    places = tokens["offset_mapping"]
    return tokens["input_ids"], [int(any(start < to and end > since for since, to in spans)) for start, end in places]


def _shape(conversation: Conversation) -> str:
    turns = [
        (turn["role"], learned, bool(turn["content"]), sorted(turn), [*_parts(turn)])
        for turn, learned in zip(conversation.turns, conversation.learned, strict=True)
    ]
    others = {key: value for key, value in conversation.options.items() if key != "tools"}
    return repr((turns, sorted(others.items()), len(conversation.options.get("tools", ()))))


def _require_all_written(conversation: Conversation, tokenizer: Tokenizer) -> None:
    """Raises RunError if the template leaves out a turn's words, reasoning or tool calls, or the tools.

    Each part is marked, and must be in what the template writes. The thoughts of a turn that is not learned need not
    stay when more follows: leaving them out of the history is what templates of reasoning models do.
    """
    turns, options = conversation.turns, dict(conversation.options)
    if taken := NOT_THE_TEMPLATES & options.keys():
        raise RunError(
            f"the rows give the chat template {', '.join(sorted(taken))}, which is not its to take: leave it out of "
            f"chat_template_kwargs"
        )
    marked: list[Turn] = []
    expected: list[tuple[str, str, str]] = []  # a part, in words and by its key, and its mark
    for number, (turn, learned) in enumerate(zip(turns, learned_turns(conversation), strict=True)):
        marks = [(part, f"{PLACEHOLDER}{number}.{at}{PLACEHOLDER}") for at, part in enumerate(_parts(turn))]
        marked.append(_with_marks(turn, marks))
        parts = [(f"{WORDS.get(part, part)} of a turn of the role {turn['role']}", part, mark) for part, mark in marks]
        if not learned:
            thoughts = [part for part in parts if part[1] in ("thoughts", *REASONING)]
            _require_marks(thoughts, marked, tokenizer, options)
            parts = [part for part in parts if part not in thoughts]
        expected += parts
    if options.get("tools"):
        options["tools"], tool_marks = _marked_tools(options["tools"])
        expected += [("tools", "tools", mark) for mark in tool_marks]
    _require_marks(expected, marked, tokenizer, options)


def _require_marks(
    expected: list[tuple[str, str, str]], turns: list[Turn], tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    text = _rendered(tokenizer, turns, options) if expected else ""
    for words, part, mark in expected:
        if mark not in text:
            twin = training_twin(_template(tokenizer, options))
            if twin and mark not in _rendered(tokenizer, turns, options, chat_template=twin.read_text("utf-8")):
                twin = None
            ignored = f" with data.source.leave_out = {json.dumps([part])}" if part not in WORDS else ""
            raise RunError(
                f"the chat template of model.base leaves out the {words}: name a template that writes them in "
                f"{KEY}{_such_as(twin)}, or leave them out of the rows{ignored}"
            )


def _parts(turn: Turn) -> Iterator[str]:
    """The parts of a turn that a reader would miss."""
    if turn["content"] or not set(turn) & {"tool_calls", *REASONING}:
        yield "content"
    if turn["role"] == "assistant" and THOUGHTS_END in (turn["content"] or ""):
        yield "thoughts"
    yield from (key for key in REASONING if turn.get(key))
    yield from ("tool_calls" for _ in turn.get("tool_calls", ()))


def _with_marks(turn: Turn, marks: list[tuple[str, str]]) -> Turn:
    """The turn with a mark in each part: of tool calls one in each, as an argument."""
    turn, calls = dict(turn), iter(turn.get("tool_calls", ()))
    called = []
    for part, mark in marks:
        if part == "tool_calls":
            call = next(calls)
            function = call["function"]
            called.append(call | {"function": function | {"arguments": function["arguments"] | {mark: mark}}})
        elif part == "thoughts":
            turn["content"] = turn["content"].replace(THOUGHTS_END, mark + THOUGHTS_END, 1)
        else:
            turn[part] = (turn[part] or "") + mark
    return turn | ({"tool_calls": called} if called else {})


def _marked_tools(tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Tools whose descriptions are marked, and the marks."""
    marked, marks = [], []
    for number, tool in enumerate(tools):
        mark = f"{PLACEHOLDER}{number}{PLACEHOLDER}"
        inner = tool.get("function", tool)
        inner = inner | {"description": f"{inner.get('description') or ''}{mark}"}
        marked.append(tool | {"function": inner} if "function" in tool else inner)
        marks.append(mark)
    return marked, marks
