"""Which chat template renders conversations: the tokenizer's, a file's, or one that TRL ships; and on which date."""

import re
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.messages.errors import RunError
from engine.objectives.base import Tokenizer

KEY = "model.chat_template"
DIRECTIVE = re.compile(r"strftime_now\s*\(")
DIRECTIVES = "YymdbBaAjHIMSp"  # of a date at midnight
# A plus sign keeps the line break that may follow.
END = "{% endmacro +%}"


def chosen_template(tokenizer: Tokenizer, name: str | None) -> Any:
    """Returns the chat template that the recipe names, or the tokenizer's; RunError if there is none of that name."""
    shipped = tokenizer.chat_template
    named = shipped if isinstance(shipped, dict) else {}
    if name is None:
        return shipped
    if name in named:
        return named[name]
    if (file := template_file(name)) is None:
        known = f", no template of the tokenizer ({', '.join(sorted(named))})" if named else ""
        raise RunError(
            f"{KEY} is {name!r}, which is no file{known} and none that the package trl ships"
            f"{_trl_names() or ' (it is not installed: pip install trl)'}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{KEY} is {name!r}, which cannot be read: {error}") from None


def template_file(name: str) -> Path | None:
    """Returns the file of a template: the one at a path, or TRL's of that name; None if it is neither."""
    if Path(name).is_file():
        return Path(name)
    file = folder / f"{name}.jinja" if (folder := _trl_folder()) and "/" not in name else None
    return file if file is not None and file.is_file() else None


def training_twin(template: str) -> Path | None:
    """Returns TRL's file of the variant of a template that marks what the assistant writes, if it ships one."""
    for file in sorted(folder.glob("*_training.jinja")) if (folder := _trl_folder()) else ():
        plain = file.with_name(file.name.replace("_training", ""))
        if plain.is_file() and plain.read_text(encoding="utf-8") == template:
            return file
    return None


def _trl_folder() -> Path | None:
    spec = find_spec("trl")  # which does not import it: that takes seconds
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "chat_templates"


def _trl_names() -> str:
    names = [file.stem for file in sorted(folder.glob("*_training.jinja"))] if (folder := _trl_folder()) else []
    return f": name a file or one of {', '.join(names)}" if names else ""


def writes_the_date(template: Any) -> bool:
    """Returns whether a template asks for today's date."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(DIRECTIVE.search(text) for text in texts)


def dated(template: Any, day: date) -> Any:
    """Returns the template with `day` for today: a macro of the name `strftime_now` hides transformers' clock."""
    if isinstance(template, dict):
        return {name: dated(text, day) for name, text in template.items()}
    if not writes_the_date(template):
        return template
    values = {letter: day.strftime(f"%{letter}") for letter in DIRECTIVES} | {"-d": str(day.day), "-m": str(day.month)}
    replaced = "".join(f".replace('%{directive}', '{value}')" for directive, value in values.items())
    return f"{{% macro strftime_now(form) %}}{{{{ form{replaced} }}}}{END}{template}"


def undated(template: Any) -> Any:
    """Returns the template that `dated` was given."""
    if isinstance(template, dict):
        return {name: undated(text) for name, text in template.items()}
    head, end, rest = (template or "").partition(END)
    return rest if end and head.startswith("{% macro strftime_now(form) %}") else template
