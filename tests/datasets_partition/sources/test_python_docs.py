from pathlib import Path

import pytest

from datasets_partition.core.types import DataError
from datasets_partition.sources.python_docs import PROMPT_END, SCHEMA, PythonDocs, documented

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
