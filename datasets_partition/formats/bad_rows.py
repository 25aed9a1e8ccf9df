"""Rows that fit no format: an error that names the row, or left out and counted."""

from typing import Literal

OnBadRow = Literal["error", "skip"]


class BadRow(Exception):
    """Why one row cannot be used: a reason that many rows can share, and a detail about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
