"""The language of the code: names that say what a thing is, and sentences that a stranger reads once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "strategies", "datasets_partition", "experiments", "tests")
EMPTY_NAMES = {"found", "got", "one", "own", "done", "told"}  # they say that there is something, and not what
RIDDLES = (
    "How a cohort's work is had",
    "How a slot's end shows",
    "the same in any company",
    "a fresh page is a dear one",
    "Who waits keeps all others from a store",
    "for who takes longer than thought",
    "it knows better why",
    "people's heirs may listen to nobody",
    "Who comes second gives its own up",
)


def empty_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of each local, parameter, field and attribute that is called one of EMPTY_NAMES."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Name(id=name, ctx=ast.Store())
                | ast.arg(arg=name)
                | ast.Attribute(attr=name, ctx=ast.Store())
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.FunctionDef(name=name)
            ) if name in EMPTY_NAMES:
                yield node.lineno, name


@pytest.mark.parametrize("package", PACKAGES)
def test_names_say_what_they_hold(package: str) -> None:
    places = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, name in empty_names(ast.parse(path.read_text("utf-8")))
    ]
    assert not places, "\n" + "\n".join(places)


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "for got in x: pass",
        "def f(own): pass",
        "lambda told: 0",
        "[one for one in x]",
        "self.done = 1",
        "class A:\n    found: int",
        "with x as got: pass",
        "(found := 1)",
        "a, *done = x",
        "match x:\n    case {'a': one}: pass",
        "try: pass\nexcept E as told: pass",
        "def own(): pass",
    ],
)
def test_an_empty_name_is_seen(source: str) -> None:
    assert len(list(empty_names(ast.parse(source)))) == 1


def test_no_sentence_is_a_riddle() -> None:
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    pages += [path for path in files if path != Path(__file__)]
    texts = {path: " ".join(path.read_text("utf-8").replace("#", " ").split()) for path in pages}
    assert [(path.name, riddle) for path, text in texts.items() for riddle in RIDDLES if riddle in text] == []
