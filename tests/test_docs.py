"""README.md and docs/*.md: what they point to exists, their recipes are TOML, and they stay short."""

import ast
import re
import tomllib
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PLANTED = (
    "engine/config/fourierft.py",
    "engine/objectives/unlikelihood.py",
    "strategies/transforms/half.py",
)  # files that extending.md lets readers add
UNLIMITED = ("docs/extending.md",)  # holds complete examples

MAX_COLUMNS = 110  # of running text
MAX_LINES = 150

PACKAGES = "engine|strategies|datasets_partition|experiments|tests"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(rf"(?<![\w./-])(?:{PACKAGES}|docs)/[\w./-]*")
MODULE = re.compile(rf"(?<![\w./-])(?:{PACKAGES})(?:\.[A-Za-z_]\w*)+(?![\w/])")
SUFFIXES = (".md", ".py", ".toml")


def lines_of(text: str) -> Iterator[tuple[str, int, str]]:
    """(kind, number, text) of each line: kind is "prose", "table", "fence", or the language of code."""
    fence = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fence = None if fence else line[3:] or "code"
            yield "fence", number, line
        else:
            outside = "table" if line.startswith("|") else "code" if line.startswith("    ") else "prose"
            yield fence or outside, number, line


def long_lines(text: str) -> list[int]:
    """Numbers of the lines of running text that are too long; tables, code and the targets of links are free."""
    prose = ((number, line) for kind, number, line in lines_of(text) if kind == "prose")
    return [number for number, line in prose if len(re.sub(r"\]\([^)]*\)", "]", line)) > MAX_COLUMNS]


def anchors(text: str) -> set[str]:
    """What links may name behind a `#`, made of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str) -> list[str]:
    """Links to files or headings of this repository that are not there."""
    return [
        target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target) and not leads(page, text, target)
    ]


def leads(page: str, text: str, target: str) -> bool:
    """Whether the target of a page's link, `file`, `file#heading` or `#heading`, is there."""
    name, _, anchor = target.partition("#")
    path = ((ROOT / page).parent / name).resolve()
    if not anchor:
        return path.exists()
    return anchor in anchors(path.read_text("utf-8") if path.is_file() else text)


def is_module_or_name(dotted: str) -> bool:
    """Whether a dotted name is a package, a module, or what a module defines or imports."""
    parts = dotted.split(".")
    path = ROOT.joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    parent = ROOT.joinpath(*parts[:-1])
    file = parent / "__init__.py" if parent.is_dir() else parent.with_suffix(".py")
    if not file.is_file():
        return False
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name):
                names.add(name)
            case ast.ImportFrom(names=imported):
                names |= {alias.asname or alias.name for alias in imported}
    return parts[-1] in names


def missing(text: str) -> list[str]:
    """Paths and modules of this repository that a page names, in prose or code, and that are not there."""
    paths = {path.rstrip(".") for path in FILE.findall(text)}
    modules = {name for name in MODULE.findall(text) if not name.endswith(SUFFIXES)}
    return sorted(
        [path for path in paths if not (ROOT / path).exists() and path not in PLANTED]
        + [name for name in modules if not is_module_or_name(name)]
    )


def toml_snippets(text: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of code marked as TOML, or that begins with a table's name in brackets."""
    for kind, piece in groupby(lines_of(text), key=itemgetter(0)):
        _, numbers, lines = zip(*piece, strict=True)
        code = "\n".join(line.removeprefix("    ") for line in lines)
        if kind == "toml" or (kind == "code" and re.match(r"\[[\w.]+\]\n", code)):
            yield numbers[0], code


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(page, read(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_modules_exist(page: str) -> None:
    assert missing(read(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_recipes_are_toml(page: str) -> None:
    for line, snippet in toml_snippets(read(page)):
        try:
            tomllib.loads(snippet)
        except tomllib.TOMLDecodeError as error:
            pytest.fail(f"{page}:{line}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_running_text_is_narrow(page: str) -> None:
    assert long_lines(read(page)) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (*UNLIMITED,)])
def test_pages_are_short(page: str) -> None:
    assert len(read(page).splitlines()) <= MAX_LINES


WIDE = "x" * 111


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{WIDE}\n", [1]),
        (f"| a |\n|---|\n| {WIDE} |\n\n{WIDE}", [5]),
        (f"```\n{WIDE}\n```\n{WIDE}\n", [4]),
        (f"    {WIDE}\n", []),
        (f"[{'x' * 100}]({WIDE})\n", []),
    ],
)
def test_wide_lines_are_seen_in_running_text_alone(text: str, expected: list[int]) -> None:
    assert long_lines(text) == expected


def test_what_is_not_there_is_named() -> None:
    text = "`tests/test_docs.py`, `tests/gone.py`, engine/gone/, experiments.run, `engine.gone`, docs/privacy.md."
    assert missing(text) == ["engine.gone", "engine/gone/", "tests/gone.py"]
    text = "# Some *heading*\n[a](#some-heading) [b](#other) [c](test_docs.py) [d](gone.md) [e](https://example.org)"
    assert broken_links("tests/page.md", text) == ["#other", "gone.md"]


def test_recipes_are_taken_from_both_kinds_of_code() -> None:
    text = "```toml\nseed = 1\n```\n\n    [train]\n    steps = 1\n\nprose\n\n    fedpost run\n"
    assert [(line, tomllib.loads(snippet)) for line, snippet in toml_snippets(text)] == [
        (2, {"seed": 1}),
        (5, {"train": {"steps": 1}}),
    ]
