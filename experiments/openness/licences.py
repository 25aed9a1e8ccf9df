"""What licences say, as data: see licences.toml."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

FILE = Path(__file__).parent / "licences.toml"
FieldOfUse = Literal["any", "use policy", "list of bans", "non-commercial"]
Outputs = Literal["silent", "free", "not for others", "if named", "derivative"]


@dataclass(frozen=True, kw_only=True)
class Licence:
    """The clauses of one licence; `users` is the number from which another licence is needed."""

    id: str
    field_of_use: FieldOfUse
    redistribution: str
    outputs: Outputs
    naming: str | None = None
    users: int | None = None
    excluded: tuple[str, ...] = ()
    also: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether anybody may use, study, modify and share what has it, for any purpose."""
        return self.field_of_use == "any" and self.users is None and not self.excluded

    def clauses(self) -> list[tuple[str, str]]:
        """What each clause says, in words."""
        users = "-" if self.users is None else f"above {self.users:,} monthly users another licence"
        return [
            ("field of use", self.field_of_use),
            ("to pass it on", self.redistribution),
            ("naming", self.naming or "-"),
            ("users", users),
            ("outputs that train models", self.outputs),
            ("not licensed in", ", ".join(self.excluded) or "-"),
            ("also", self.also or "-"),
        ]


@cache
def licences() -> dict[str, Licence]:
    """All known licences by id."""
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: Licence(**{**table, "id": name, "excluded": tuple(table.get("excluded", ()))})
        for name, table in tables.items()
    }
