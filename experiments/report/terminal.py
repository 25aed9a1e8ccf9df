"""What the commands write to a terminal: all text is shown as text, also names, rows, generations and errors.

Rich would take part of it for markup, and the terminal for commands, such as to clear the screen or fill the clipboard.
"""

import sys
from unicodedata import category

from rich.console import Console
from rich.text import Text


def inert(text: object) -> str:
    r"""The text in one line, with escapes such as `\x1b` for control and invisible characters and lone surrogates."""
    shown = (c if c.isprintable() or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


def inert_lines(text: object) -> str:
    """Like `inert`, but newlines stay."""
    return "\n".join(map(inert, str(text).split("\n")))


def plain(text: object, style: str = "") -> Text:
    """The text in one line, for rich: inert, and no markup."""
    return Text(inert(text), style)


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Prints lines of text, inert, on stdout or as an `error` on stderr."""
    print(inert_lines(text), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def console(*, soft_wrap: bool = True) -> Console:
    """Rich's console on stdout, where a string is no markup either; it leaves long lines to the terminal to wrap."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)
