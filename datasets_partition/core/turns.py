"""Conversations as chat templates read them, from the turns of a canonical table."""

import json
from typing import Any, NamedTuple

import pyarrow as pa

from datasets_partition.core.types import OPTIONS


class Conversation(NamedTuple):
    """Turns with all keys that templates read, whether each may be learned, and the template's other arguments."""

    turns: list[dict[str, Any]]
    learned: list[bool]
    options: dict[str, Any]


def conversation_of(turns: list[dict[str, Any]], options: str | None = None) -> Conversation:
    """The conversation of canonical turns and a row's options."""
    read = [
        {"role": turn["role"], "content": turn["content"], **json.loads(turn.get("more") or "{}")} for turn in turns
    ]
    return Conversation(read, [turn.get("learned") is not False for turn in turns], json.loads(options or "{}"))


def conversations(rows: pa.Table, name: str) -> list[Conversation]:
    """The conversations in the column `name` of a canonical table."""
    options = rows[OPTIONS].to_pylist() if OPTIONS in rows.column_names else [None] * rows.num_rows
    return [conversation_of(*pair) for pair in zip(rows[name].to_pylist(), options, strict=True)]


def words(turn: dict[str, Any]) -> str:
    """Writes what a turn says: its content, and as JSON what else it has for the chat template."""
    more = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return " ".join(filter(None, (turn["content"], json.dumps(more, ensure_ascii=False) if more else "")))
