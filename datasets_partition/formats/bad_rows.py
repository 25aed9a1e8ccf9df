"""Rows that fit no format: an error that names the row, or left out and counted."""

from collections import Counter
from typing import Literal

OnBadRow = Literal["error", "skip"]


class BadRow(Exception):
    """Why one row cannot be used: a reason that many rows can share, and what is special to this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class BadRows:
    """What becomes of a source's bad rows; counts by reason those that are left out."""

    def __init__(self, policy: OnBadRow) -> None:
        self.policy = policy
        self.skipped: Counter[str] = Counter()

    def add(self, where: str, bad: BadRow) -> None:
        """Counts the row at `where` (its file and number), or raises ValueError for it, as the policy says."""
        if self.policy == "error":
            detail = f" ({bad.detail})" if bad.detail else ""
            raise ValueError(
                f'{where} {bad.reason}{detail}: mend it, or leave such rows out with data.source.on_bad_row = "skip"'
            )
        self.skipped[bad.reason] += 1

    def __str__(self) -> str:
        """The reasons, the most frequent first."""
        return "; ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
