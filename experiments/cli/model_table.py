"""`fedpost models`: families of base models by name, and a table of what works with each."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from engine.config.quantize import not_installed
from engine.messages.errors import RunError
from experiments.preflight.family_list import COLUMNS, family_names
from experiments.report.terminal import say

HEAD = f"| family | {' | '.join(COLUMNS)} |"
RULE = f"|{'---|' * (1 + len(COLUMNS))}"


def listing() -> Iterator[str]:
    """One line for each family: its name, and how its bases are called."""
    names = family_names()
    width = max(map(len, names))
    yield from (f"{family:<{width}}  {known}" for family, known in names.items())
    yield "Bases of other families are tried in the same way: fedpost run RECIPE --dry. --table checks what works."


def table_line(family: str) -> str:
    """A line of the table, made by checking the family."""
    from experiments.preflight.families import check, tiny_base  # imports transformers and peft

    with tiny_base(family) as base:
        return f"| {family} | {' | '.join(check(base).values())} |"


def show_table(page: Path | None) -> None:
    """Checks all families, in some minutes, and prints the table; with a page, replaces the table there too.

    RunError without bitsandbytes, by which one column is checked.
    """
    require_quantizer()
    before, after = _around(page) if page is not None else ("", "")
    lines = [HEAD, RULE]
    say("\n".join(lines))
    for family in family_names():
        lines.append(table_line(family))
        say(lines[-1])
    if page is not None:
        page.write_text(f"{before}{chr(10).join(lines)}\n{after}", encoding="utf-8")


def require_quantizer() -> None:
    """Raises RunError without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise not_installed("bitsandbytes")


def _around(page: Path) -> tuple[str, str]:
    """The page's text before and after its table; RunError if it has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, head, rest = text.partition(HEAD + "\n")
    if not head:
        raise RunError(f"{page} has no table to replace: write the line {HEAD!r} where it belongs")
    lines = rest.splitlines(keepends=True)
    end = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before, "".join(lines[end:])
