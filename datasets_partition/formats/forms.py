"""The forms in which users keep rows, as TRL, Alpaca and ShareGPT name them, and the canonical format of each."""

import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.core.types import (
    MESSAGES,
    OPTIONS,
    PREFERENCE,
    PROMPT_COMPLETION,
    PROMPT_ONLY,
    UNPAIRED_PREFERENCE,
)
from datasets_partition.formats.rows import BadRow, Row, text
from datasets_partition.formats.turns import Turn, leaving_out, options, parsed, turns

OnBadRow = Literal["error", "skip"]
Content = tuple[str, Row]  # a row's canonical format, and the values of its columns
Arrays = dict[str, pa.Array]

PREAMBLE = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
ALPACA = (f"{PREAMBLE}. {REQUEST}", "\n\n### Instruction:\n", "\n\n### Response:\n")
ALPACA_INPUT = (f"{PREAMBLE}, paired with an input that provides further context. {REQUEST}", "\n\n### Input:\n")


def shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """The length of TRL's implicit prompt: the longest common prefix without a final space; each keeps something."""
    shortest = min(len(chosen), len(rejected))
    # Bisection: comparing slices is far faster than comparing characters.
    low = bisect_left(range(shortest), True, key=lambda end: chosen[: end + 1] != rejected[: end + 1])
    if low == shortest:
        return max(shortest - 1, 0)
    return low - 1 if low and chosen[low - 1] == " " else low


class Form(NamedTuple):
    """A way to keep a row: the columns that it needs, those that it may have, and the conversions.

    `row` raises BadRow; `flat` converts columns of text without nulls. `mapped` are read only if the user names them in
    data.source.columns. Rows of this form have no column of `without`.
    """

    needs: tuple[str, ...]
    row: Callable[[Row], Content]
    flat: Callable[[Arrays], Arrays] | None = None
    optional: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()

    def reads(self, mapped: Collection[str]) -> tuple[str, ...]:
        """The columns that rows are made of, where the user has named those in `mapped`."""
        return (*self.needs, *self.optional, *(name for name in self.mapped if name in mapped))


def _only(*names: str) -> Callable[[Arrays], Arrays]:
    return lambda columns: {name: columns[name] for name in names if name in columns}


def _text_row(row: Row) -> Content:
    return PROMPT_COMPLETION, {"prompt": "", "completion": text(row, "text")}


def _text_flat(columns: Arrays) -> Arrays:
    return {"prompt": pa.repeat("", len(columns["text"])), "completion": columns["text"]}


def _alpaca_row(row: Row) -> Content:
    """Alpaca's prompt; a system prompt takes the place of its first sentences, and earlier pairs come before."""
    instruction, output = text(row, "instruction"), text(row, "output")
    given = "" if row.get("input") is None else text(row, "input")
    head = row.get("system") if row.get("system") in (None, "") else text(row, "system")
    prompt = head or (ALPACA_INPUT if given else ALPACA)[0]
    for question, answer in _pairs(row.get("history")):
        prompt += ALPACA[1] + question + ALPACA[2] + answer
    prompt += ALPACA[1] + instruction + (ALPACA_INPUT[1] + given if given else "") + ALPACA[2]
    return PROMPT_COMPLETION, {"prompt": prompt, "completion": output}


def _pairs(history: Any) -> list[tuple[str, str]]:
    """Earlier questions and answers, as lists or JSON text."""
    pairs = parsed(history) if isinstance(history, str) else history
    if pairs in (None, ""):
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair) for pair in pairs
    ):
        raise BadRow(
            "has a history that is no list of pairs of texts", f"it may be left out with {leaving_out('history')}"
        )
    return [(question, answer) for question, answer in pairs]


def _alpaca_flat(columns: Arrays) -> Arrays:
    instruction = columns["instruction"]
    prompt = pc.binary_join_element_wise(ALPACA[0] + ALPACA[1], instruction, ALPACA[2], "")
    if "input" in columns:
        given, parts = pc.fill_null(columns["input"], ""), (ALPACA_INPUT[0] + ALPACA[1], ALPACA_INPUT[1], ALPACA[2])
        long = pc.binary_join_element_wise(parts[0], instruction, parts[1], given, parts[2], "")
        prompt = pc.if_else(pc.equal(given, ""), prompt, long)
    return {"prompt": prompt, "completion": columns["output"]}


def _prompt_completion_row(row: Row) -> Content:
    prompt, completion = _alike(row, "prompt", "completion")
    content = {"prompt": prompt, "completion": completion}
    if isinstance(row.get("label"), bool):
        return UNPAIRED_PREFERENCE, content | {"label": row["label"]} | _options(row, prompt)
    if isinstance(prompt, str):
        return PROMPT_COMPLETION, content
    context = [turn | {"learned": False} if turn["role"] == "assistant" else turn for turn in prompt]
    return MESSAGES, {"messages": context + completion} | _options(row, prompt)


def _conversation_row(name: str, row: Row) -> Content:
    """A conversation, after the system prompt in its separate column, as in many ShareGPT files."""
    conversation = _after_system(row, turns(row, name), name)
    return MESSAGES, {"messages": conversation} | _options(row, conversation, name)


def _after_system(row: Row, conversation: list[Turn], name: str) -> list[Turn]:
    """The conversation, which begins with the system prompt in a column of its own, if there is one."""
    if row.get("system") in (None, ""):
        return conversation
    first = {"role": "system", "content": text(row, "system")}
    if conversation[0]["role"] == "system" and conversation[0] != first:
        raise BadRow(f"has one system prompt in its column system and another in its {name}")
    return [first, *conversation[conversation[0] == first :]]


def _options(row: Row, conversation: Any, name: str = "prompt") -> Row:
    """The column of what a chat template takes beside turns, if there is anything; text has none."""
    beside = options(row, name) if isinstance(conversation, list) else {}
    return {OPTIONS: json.dumps(beside, ensure_ascii=False)} if beside else {}


def _preference_row(row: Row) -> Content:
    if isinstance(row["chosen"], list) and not isinstance(row["prompt"], list):
        kind, content = _implicit_row(row)
        # As in UltraFeedback, where it repeats the conversations' first turn.
        if row["prompt"] and all(turn["content"] != row["prompt"] for turn in content["prompt"]):
            way_out = f"it may be left out with {leaving_out('prompt')}"
            raise BadRow("has a prompt that is no turn which chosen and rejected share", way_out)
        return kind, content
    prompt, chosen, rejected = _alike(row, "prompt", "chosen", "rejected")
    return PREFERENCE, {"prompt": prompt, "chosen": chosen, "rejected": rejected} | _options(row, prompt)


def _implicit_row(row: Row) -> Content:
    chosen, rejected = (_read(row, name) for name in _same_kind(row, "chosen", "rejected"))
    cut = shared(chosen, rejected)
    if not cut and isinstance(chosen, list):
        raise BadRow("has no turn that chosen and rejected share, to be the prompt")
    prompt = chosen[:cut]
    if isinstance(prompt, list):
        prompt = _after_system(row, prompt, "chosen")
    elif "system" in row:
        raise BadRow("has a system prompt for chosen and rejected that are text without a prompt")
    return PREFERENCE, {"prompt": prompt, "chosen": chosen[cut:], "rejected": rejected[cut:]} | _options(row, prompt)


def _prompt_row(row: Row) -> Content:
    (prompt,) = _alike(row, "prompt")
    return PROMPT_ONLY, {"prompt": prompt} | _options(row, prompt)


def _alike(row: Row, prompt: str, *answers: str) -> list[Any]:
    """The values of a prompt and its answers, all text or all turns; turns if a system prompt stands beside them."""
    names = _same_kind(row, prompt, *answers)
    values = [_read(row, name) for name in names]
    if "system" not in row:
        return values
    if isinstance(values[0], str):
        roles = ("user", *("assistant" for _ in answers))
        values = [[{"role": role, "content": value}] for role, value in zip(roles, values, strict=True)]
    return [_after_system(row, values[0], prompt), *values[1:]]


def _same_kind(row: Row, *names: str) -> tuple[str, ...]:
    nested = [isinstance(row[name], list) for name in names]
    if any(nested) and not all(nested):
        raise BadRow(f"has text and turns side by side in {', '.join(names)}")
    return names


def _read(row: Row, name: str) -> Any:
    return turns(row, name) if isinstance(row[name], list) else text(row, name)


TEMPLATE = ("tools", "functions", "chat_template_kwargs")
SPOKEN = (*TEMPLATE, OPTIONS)  # read beside turns
# Kept as other columns too, by which rows can be partitioned.
BESIDE_TURNS = ("system", "history", *TEMPLATE)
PAIR = frozenset(["prompt", "completion"])
ALPACA_COLUMNS = ("instruction", "output")
TRIPLE = ("prompt", "chosen", "rejected")
LABELED = ("prompt", "completion", "label")
ANSWERED = frozenset(["text", "chosen", "rejected", *ALPACA_COLUMNS])
# A row's columns are compared with the forms in this order.
FORMS = (
    Form(TRIPLE, _preference_row, _only(*TRIPLE), optional=SPOKEN, mapped=("system",)),
    Form(TRIPLE[1:], _implicit_row, optional=SPOKEN, mapped=("system",)),
    Form(("messages",), partial(_conversation_row, "messages"), optional=("system", *SPOKEN)),
    Form(("conversations",), partial(_conversation_row, "conversations"), optional=("system", *SPOKEN)),
    Form(LABELED[:2], _prompt_completion_row, _only(*LABELED), optional=("label", *SPOKEN), mapped=("system",)),
    Form(ALPACA_COLUMNS, _alpaca_row, _alpaca_flat, optional=("input", "system", "history"), without=PAIR),
    Form(("text",), _text_row, _text_flat, without=PAIR),
    Form(("prompt",), _prompt_row, _only("prompt"), optional=SPOKEN, mapped=("system",), without=ANSWERED),
)
# The keys that data.source.columns takes.
NAMES = (*dict.fromkeys(name for form in FORMS for name in form.reads(form.mapped) if name != OPTIONS), "client")


@lru_cache(maxsize=1024)
def form_of(names: frozenset[str], mapped: frozenset[str]) -> Form | None:
    """The form of a row with the columns `names`, if any; columns that the user has `mapped` decide between several."""
    decided = mapped & {name for form in FORMS for name in form.needs}
    for form in FORMS:
        if names.issuperset(form.needs) and decided.issubset(form.needs) and (decided or not form.without & names):
            return form
    return None
