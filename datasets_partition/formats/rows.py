"""What a row of a source is before it has a format, and why one cannot be used."""

from typing import Any

Row = dict[str, Any]


class BadRow(Exception):
    """Why one row cannot be used: a reason that many rows can share, and a detail about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def text(row: Row, name: str) -> str:
    """The column `name` of a row. Raises BadRow if it is not text."""
    value = row[name]
    if value is None:
        raise BadRow(f"has a null {name}")
    if not isinstance(value, str):
        raise BadRow(f"has no text as its {name}", f"it is {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """The name of a value's type."""
    return "null" if value is None else type(value).__name__
