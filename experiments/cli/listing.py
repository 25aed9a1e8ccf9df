"""`fedpost strategies`: all strategies and transforms, as text for a terminal of 100 columns."""

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import get_args

from rich.text import Text

from engine.config.federation import works_in_gangs
from experiments.report.terminal import plain
from strategies import Strategies, Transforms

WIDTH = 100
COLUMNS = (18, 8, 8, 8, 8, 8)
LEGEND = {
    "reads": "what the server needs: the sum of the updates (works with secure aggregation), several sums one after "
    "another (passes), or each update",
    "LoRA": "needed: works on adapters only; the others take adapters and fully tuned models",
    "ranks": "mixed: clients may have adapters of different ranks",
    "gangs": "yes: works on parts of vectors, so that a client may be a gang of ZeRO ranks, each with its shard",
    "state": "yes: a client keeps state from round to round",
    "recipe": 'strategy = "fedprox", or with keys, strategy = { kind = "fedprox", mu = 0.1 }; transforms = [{ kind = '
    '"clip" }, ...]; your own: strategy = "my_module:MyStrategy"',
    "--check": "checks a strategy of your own: fedpost strategies --check my_module:MyStrategy",
}


def listing() -> Iterator[Text]:
    """Each strategy with what it reads, needs and allows, its summary and its keys; then the transforms."""
    yield _row("kind", "reads", "LoRA", "ranks", "gangs", "state", "paper", style="bold underline")
    for strategy in (member() for member in get_args(Strategies)):
        lora, ranks = "needed" if strategy.needs_lora else "-", "mixed" if strategy.mixed_ranks else "-"
        gangs, state = "yes" if works_in_gangs(strategy) else "-", "yes" if strategy.keeps_state else "-"
        yield _row(strategy.kind, strategy.reads, lora, ranks, gangs, state, strategy.paper)
        yield from _about(strategy)
    yield Text()
    yield _row("transforms", "", "", "", "", "state", "", style="bold underline")
    for transform in (member() for member in get_args(Transforms)):
        yield _row(transform.kind, "", "", "", "", "yes" if transform.keeps_state else "-", "")
        yield from _about(transform)
    yield Text()
    for word, meaning in LEGEND.items():
        yield from wrapped(f"{word:<10}{meaning}", " " * 10)


def first_sentence(docstring: str) -> str:
    """The text up to the first full stop, in one line."""
    return re.split(r"(?<=[^.]\.)(?<!\beq\.)\s", " ".join(docstring.split()), maxsplit=1)[0]


def _row(*cells: str, style: str = "") -> Text:
    """The first cells in columns, the last as it is; the first in bold."""
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, COLUMNS, strict=False)]
    row = plain("".join([*padded, *cells[len(COLUMNS) :]]).rstrip(), style)
    row.stylize("bold", 0, len(cells[0]))
    return row


def _about(member: object) -> Iterator[Text]:
    """Its summary and its keys, each on separate lines."""
    keys = {field.name: field.default for field in fields(type(member)) if field.name != "kind"}  # type: ignore[arg-type]
    text = ", ".join(f"{name}={'unset' if default is None else json.dumps(default)}" for name, default in keys.items())
    yield from wrapped("    " + first_sentence(str(member.__doc__)), "    ")
    yield from wrapped("    " + text, "    ", "dim")


def wrapped(text: str, indent: str, style: str = "") -> Iterator[Text]:
    """Lines that fit, the second and later ones indented; a key stays with its value."""
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
    return (plain(line, style) for line in lines)
