from pathlib import Path
from typing import get_args

import pytest

from datasets_partition.core.types import DataError
from datasets_partition.sources.python_docs import (
    PAIRS,
    PROMPT_END,
    SCHEMA,
    PythonDocs,
    Rejected,
    documented,
    rejected_completions,
)

FILE = '''
def outer(a, b):
    """Add two
    numbers.

    Not the first paragraph.
    """
    def inner(c):
        "Double it."
        return 2 * c

    return inner(a) + b


class Box:
    """Holds one thing."""

    size = 1

    async def open(self):
        """Open it."""
        await self.size

    def close(self):
        return None


def short(): "On one line."


def empty():
    """ """
'''


def test_functions_methods_and_classes_without_their_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(FILE)
    inner = "    def inner(c):\n        return 2 * c"
    assert dict(documented(path, 500)) == {
        f"def outer(a, b):\n{inner}\n\n    return inner(a) + b{PROMPT_END}": "Add two numbers.",
        f"def inner(c):\n    return 2 * c{PROMPT_END}": "Double it.",
        "class Box:\n\n    size = 1\n\n    async def open(self):\n        await self.size\n\n"
        f"    def close(self):\n        return None{PROMPT_END}": "Holds one thing.",
        f"async def open(self):\n    await self.size{PROMPT_END}": "Open it.",
    }


def test_no_prompt_gives_away_what_another_row_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(
        'class A:\n    """Of A."""\n    class B:\n        """Of\n        B."""\n        def c(\n            self,\n'
        '        ):\n            """Of c."""\n    def d(self): "Of d."\n    x = """Of nobody."""\n'
    )
    tail = f'    def d(self): "Of d."\n    x = """Of nobody."""{PROMPT_END}'
    assert dict(documented(path, 500)) == {
        f"class A:\n    class B:\n        def c(\n            self,\n        ):\n{tail}": "Of A.",
        f"class B:\n    def c(\n        self,\n    ):{PROMPT_END}": "Of B.",
        f"def c(\n    self,\n):{PROMPT_END}": "Of c.",
    }


def test_a_long_prompt_is_cut_at_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text('def f(a):\n    """Say."""\n    b = a\n    return b\n')
    assert [prompt for prompt, _ in documented(path, 22)] == [f"def f(a):\n    b = a{PROMPT_END}"]


@pytest.mark.parametrize("text", [b"def f(:\n", b'def f():\n    """\xff"""\n', b"x = '\x00'\n"])
def test_files_that_are_no_python_give_nothing(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "file.py"
    path.write_bytes(text)
    assert list(documented(path, 500)) == []


def test_the_rows_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PythonDocs(packages=("peft",))
    monkeypatch.setattr("sys.stdlib_module_names", frozenset({"json"}))
    table, skipped = source.load()
    assert (table.schema, skipped) == (SCHEMA, {})
    assert set(table["client"].to_pylist()) == {"json", "peft"}
    assert table.num_rows == table.group_by(["prompt", "completion"]).aggregate([]).num_rows
    assert table.equals(source.load().table)
    assert all(prompt.endswith(PROMPT_END) for prompt in table["prompt"].to_pylist())


def test_the_fingerprint_names_versions_and_missing_packages() -> None:
    python, peft = PythonDocs(packages=("peft",)).fingerprint().split()
    assert python.startswith("python==") and peft.startswith("peft==")
    with pytest.raises(DataError, match=r"data\.source\.packages names 'no_such', which is not installed: install it"):
        PythonDocs(packages=("no_such",)).fingerprint()


def test_shuffled_words_are_in_another_order_that_the_row_alone_draws() -> None:
    rows = [("f", "Add two numbers."), ("g", "Add two numbers."), ("h", "Open it."), ("i", "Close."), ("j", "so so so")]
    shuffled = rejected_completions(rows, "shuffled")
    # Written down: it is the same on any machine.
    assert shuffled == ["numbers. Add two", "two numbers. Add", "it. Open", "Close.", "so so so"]
    assert [sorted(text.split()) for text in shuffled] == [sorted(text.split()) for _, text in rows]
    assert rejected_completions(rows[::-1], "shuffled") == shuffled[::-1]


def test_plain_is_lower_case_without_the_full_stop() -> None:
    completions = ["Add two Numbers.", "Of A. Or of B.", "already plain", "More ..."]
    rows = [("f", completion) for completion in completions]
    assert rejected_completions(rows, "plain") == ["add two numbers", "of a. or of b", "already plain", "more .."]


def test_foreign_is_each_docstring_once_beside_another_row_whatever_the_order_of_rows() -> None:
    rows = [(f"def f{n}(): ...", f"Do {n}.") for n in range(50)]
    foreign = rejected_completions(rows, "foreign")
    assert sorted(foreign) == sorted(completion for _, completion in rows)
    assert all(completion != other for (_, completion), other in zip(rows, foreign, strict=True))
    assert rejected_completions(rows[::-1], "foreign") == foreign[::-1]
    more = rejected_completions([*rows, ("def g(): ...", "Go.")], "foreign")
    assert sum(before != after for before, after in zip(foreign, more[:-1], strict=True)) == 1
    assert rejected_completions(rows[:1], "foreign") == ["Do 0."]  # there is no other, and the pair is left out


@pytest.mark.parametrize("kind", get_args(Rejected))
def test_preferences_are_the_rows_with_a_rejected_completion(kind: Rejected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdlib_module_names", frozenset({"json", "string"}))
    plain, pairs = PythonDocs(packages=()).load().table, PythonDocs(packages=(), rejected=kind).load()
    assert pairs.table.schema == PAIRS
    rows = list(zip(*(plain[name].to_pylist() for name in SCHEMA.names), strict=True))
    kept = list(zip(*(pairs.table[name].to_pylist() for name in ("client", "prompt", "chosen")), strict=True))
    assert kept == [row for row in rows if row in set(kept)] and len(kept) > 10
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs.table.to_pylist())
    left_out = {"would have equal chosen and rejected completions": len(rows) - len(kept)}
    assert pairs.skipped == (left_out if len(kept) < len(rows) else {})


def test_pairs_of_equal_sides_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.py"
    monkeypatch.setattr(PythonDocs, "_files", lambda self: iter([("file", path)]))
    path.write_text("".join(f'def f{n}():\n    """{text}"""\n' for n, text in enumerate(("Twice.", "plain", "Twice."))))
    skipped = {kind: PythonDocs(rejected=kind).load().skipped for kind in get_args(Rejected)}
    reason = "would have equal chosen and rejected completions"
    assert skipped["shuffled"] == {reason: 3} and skipped["plain"] == {reason: 1}


def test_what_is_rejected_makes_another_store_and_nothing_rejected_the_one_before() -> None:
    assert "rejected" not in repr(PythonDocs())
    assert len({PythonDocs(packages=(), rejected=kind).fingerprint() for kind in (None, *get_args(Rejected))}) == 4
    assert "rejected" not in PythonDocs(packages=()).fingerprint()
