"""The forms in which users keep rows, as TRL, Alpaca and ShareGPT name them, and the canonical format of each."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.core.types import MESSAGES, PREFERENCE, PROMPT_COMPLETION, PROMPT_ONLY, UNPAIRED_PREFERENCE

OnBadRow = Literal["error", "skip"]
Row = dict[str, Any]
Content = tuple[str, Row]  # a row's canonical format, and the values of its columns
Arrays = dict[str, pa.Array]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n",
    "\n\n### Response:\n",
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:\n",
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT = {"human": "user", "gpt": "assistant"}


class BadRow(Exception):
    """Why one row cannot be used: a reason that many rows can share, and a detail about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def text(row: dict[str, Any], name: str) -> str:
    """The column `name` of a row. Raises BadRow if it is not text."""
    value = row[name]
    if value is None:
        raise BadRow(f"has a null {name}")
    if not isinstance(value, str):
        raise BadRow(f"has no text as its {name}", f"it is {kind_of(value)}")
    return value


def turns(row: dict[str, Any], name: str) -> list[dict[str, str]]:
    """The conversation in the column `name`: dicts of role and content. Raises BadRow if it is something else."""
    value = row[name]
    if value is None:
        raise BadRow(f"has null {name}")
    if not isinstance(value, list):
        raise BadRow(f"has no list of turns as its {name}", f"it is {kind_of(value)}")
    if not value:
        raise BadRow(f"has empty {name}")
    return [_turn(turn, name) for turn in value]


def _turn(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadRow(f"has a turn in its {name} that is no object with role and content", f"it is {kind_of(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"has a turn in its {name} whose role is none of {', '.join(ROLES)}", f"it is {role!r}")
    if turn.get("tool_calls"):
        raise BadRow(f"has a turn in its {name} with tool calls, which would be lost")
    if not isinstance(content, str):
        raise BadRow(f"has a turn in its {name} whose content is no text", f"it is {kind_of(content)}")
    return {"role": role, "content": content}


def kind_of(value: Any) -> str:
    """The name of a value's type."""
    return "null" if value is None else type(value).__name__


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

    `row` raises BadRow; `flat` converts columns of text without nulls. Rows of this form have no column of `without`.
    """

    needs: tuple[str, ...]
    row: Callable[[Row], Content]
    flat: Callable[[Arrays], Arrays] | None = None
    optional: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()


def _text_row(row: Row) -> Content:
    return PROMPT_COMPLETION, {"prompt": "", "completion": text(row, "text")}


def _text_flat(columns: Arrays) -> Arrays:
    return {"prompt": pa.repeat("", len(columns["text"])), "completion": columns["text"]}


def _alpaca_row(row: Row) -> Content:
    instruction, output = text(row, "instruction"), text(row, "output")
    given = "" if row.get("input") is None else text(row, "input")
    prompt = instruction.join(ALPACA) if not given else ALPACA_INPUT[0] + instruction + given.join(ALPACA_INPUT[1:])
    return PROMPT_COMPLETION, {"prompt": prompt, "completion": output}


def _alpaca_flat(columns: Arrays) -> Arrays:
    instruction = columns["instruction"]
    prompt = pc.binary_join_element_wise(ALPACA[0], instruction, ALPACA[1], "")
    if "input" in columns:
        given = pc.fill_null(columns["input"], "")
        long = pc.binary_join_element_wise(ALPACA_INPUT[0], instruction, ALPACA_INPUT[1], given, ALPACA_INPUT[2], "")
        prompt = pc.if_else(pc.equal(given, ""), prompt, long)
    return {"prompt": prompt, "completion": columns["output"]}


def _prompt_completion_row(row: Row) -> Content:
    prompt, completion = _alike(row, "prompt", "completion")
    content = {"prompt": prompt, "completion": completion}
    if isinstance(row.get("label"), bool):
        return UNPAIRED_PREFERENCE, content | {"label": row["label"]}
    if isinstance(prompt, str):
        return PROMPT_COMPLETION, content
    if any(turn["role"] == "assistant" for turn in prompt):
        raise BadRow("has an assistant turn in its prompt, which would be trained too")
    return MESSAGES, {"messages": prompt + completion}


def _conversation_row(name: str, row: Row) -> Content:
    """A conversation, after the system prompt in its separate column, as in many ShareGPT files."""
    conversation = turns(row, name)
    if row.get("tools") not in (None, "", "[]", []):
        raise BadRow(f"has tools beside its {name}, which would be lost")
    if row.get("system") not in (None, ""):
        first = {"role": "system", "content": text(row, "system")}
        if conversation[0]["role"] == "system" and conversation[0] != first:
            raise BadRow(f"has one system prompt in its column system and another in its {name}")
        conversation = [first, *conversation[conversation[0] == first :]]
    return MESSAGES, {"messages": conversation}


def _preference_row(row: Row) -> Content:
    if isinstance(row["chosen"], list) and not isinstance(row["prompt"], list):
        return _implicit_row(row)  # such a prompt repeats the conversations' first turn, as in UltraFeedback
    prompt, chosen, rejected = _alike(row, "prompt", "chosen", "rejected")
    return PREFERENCE, {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _implicit_row(row: Row) -> Content:
    chosen, rejected = _alike(row, "chosen", "rejected")
    cut = shared(chosen, rejected)
    if not cut and isinstance(chosen, list):
        raise BadRow("has no turn that chosen and rejected share, to be the prompt")
    return PREFERENCE, {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def _prompt_row(row: Row) -> Content:
    return PROMPT_ONLY, {"prompt": _alike(row, "prompt")[0]}


def _alike(row: Row, *names: str) -> list[Any]:
    """The values of columns that are all text, or all turns."""
    nested = [isinstance(row[name], list) for name in names]
    if any(nested) and not all(nested):
        raise BadRow(f"has text and turns side by side in {', '.join(names)}")
    return [turns(row, name) if nested[0] else text(row, name) for name in names]


# Read together with a conversation, and kept as other columns too, by which rows can be partitioned.
BESIDE_TURNS = ("system", "tools")
PAIR = frozenset(["prompt", "completion"])
ALPACA_COLUMNS = ("instruction", "output")
# A row's columns are compared with the forms in this order.
FORMS = (
    Form(("prompt", "chosen", "rejected"), _preference_row, dict),
    Form(("chosen", "rejected"), _implicit_row),
    Form(("messages",), partial(_conversation_row, "messages"), optional=BESIDE_TURNS),
    Form(("conversations",), partial(_conversation_row, "conversations"), optional=BESIDE_TURNS),
    Form(("prompt", "completion"), _prompt_completion_row, dict, optional=("label",)),
    Form(ALPACA_COLUMNS, _alpaca_row, _alpaca_flat, optional=("input",), without=PAIR),
    Form(("text",), _text_row, _text_flat, without=PAIR),
    Form(("prompt",), _prompt_row, dict, without=frozenset(["text", "chosen", "rejected", *ALPACA_COLUMNS])),
)
# The keys that data.source.columns takes.
NAMES = (*dict.fromkeys(name for form in FORMS for name in (*form.needs, *form.optional)), "client")


@lru_cache(maxsize=1024)
def form_of(names: frozenset[str], mapped: frozenset[str]) -> Form | None:
    """The form of a row with the columns `names`, if any; columns that the user has `mapped` decide between several."""
    decided = mapped & {name for form in FORMS for name in form.needs}
    for form in FORMS:
        if names.issuperset(form.needs) and decided.issubset(form.needs) and (decided or not form.without & names):
            return form
    return None
