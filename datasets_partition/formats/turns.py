"""Texts and conversations of a row, checked and in one shape; and the common beginning of two of them."""

from collections.abc import Sequence
from typing import Any, Literal

OnBadRow = Literal["error", "skip"]
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
        raise BadRow(f"has no text as its {name}", f"it is {_kind(value)}")
    return value


def turns(row: dict[str, Any], name: str) -> list[dict[str, str]]:
    """The conversation in the column `name`: dicts of role and content. Raises BadRow if it is something else."""
    value = row[name]
    if value is None:
        raise BadRow(f"has null {name}")
    if not isinstance(value, list):
        raise BadRow(f"has no list of turns as its {name}", f"it is {_kind(value)}")
    if not value:
        raise BadRow(f"has empty {name}")
    return [_turn(turn, name) for turn in value]


def _turn(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadRow(f"has a turn in its {name} that is no object with role and content", f"it is {_kind(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"has a turn in its {name} whose role is none of {', '.join(ROLES)}", f"it is {role!r}")
    if turn.get("tool_calls"):
        raise BadRow(f"has a turn in its {name} with tool calls, which would be lost")
    if not isinstance(content, str):
        raise BadRow(f"has a turn in its {name} whose content is no text", f"it is {_kind(content)}")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """The length of TRL's implicit prompt: the longest common prefix without a final space; each keeps something."""
    low, high = 0, min(len(chosen), len(rejected))
    shortest = high
    while low < high:  # bisection: comparing slices is far faster than comparing characters
        middle = (low + high + 1) // 2
        if chosen[low:middle] == rejected[low:middle]:
            low = middle
        else:
            high = middle - 1
    if low == shortest:
        return max(shortest - 1, 0)
    return low - 1 if low and chosen[low - 1] == " " else low
