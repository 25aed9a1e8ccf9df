"""What every strategy promises: shipped rules and users' own are held to all of it.

Each public function of the three modules is a check of one promise, which its docstring says. It takes a `Case`, raises
AssertionError with a sentence where the promise is broken, and DoesNotApply where the strategy does not make it.
"""

import inspect
from collections.abc import Callable

from strategies.contract import client, declarations, server
from strategies.contract.case import Case
from strategies.core.base import Rule

Check = Callable[[Case], None]
CHECKS: tuple[Check, ...] = tuple(
    member
    for module in (server, client, declarations)
    for name, member in vars(module).items()
    if inspect.isfunction(member) and member.__module__ == module.__name__ and not name.startswith("_")
)
RENAMED = {"remembers": "keeps_state", "personalises": "personalizes"}


def lacks(kind: type) -> list[str]:
    """The names of the members of `Rule` that a class does not define, or defines under an old name."""
    members = [name for name in vars(Rule) if not name.startswith("_")]
    defined = set(dir(kind)) - getattr(kind, "__abstractmethods__", frozenset())
    renamed = [f"{name} (it defines the old {old})" for old, name in RENAMED.items() if old in defined]
    return [name for name in members if name not in defined] + renamed
