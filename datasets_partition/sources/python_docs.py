"""The source that needs no download: the documented Python code of every installation, also as preferences."""

import ast
import importlib.util
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Literal

import pyarrow as pa

from datasets_partition.core.types import DataError, OnRows, Rows, ignore

SCHEMA = pa.schema([("client", pa.string()), ("prompt", pa.string()), ("completion", pa.string())])
PAIRS = pa.schema([(name, pa.string()) for name in ("client", "prompt", "chosen", "rejected")])

# Test suites and vendored trees document nothing of their package; lib2to3 keeps deliberately broken files.
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "__pycache__", "lib2to3", "_vendor", "thirdparty_files"}
Rejected = Literal["shuffled", "plain", "foreign"]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
PROMPT_END = '\n\n"""'


@dataclass(frozen=True)
class PythonDocs:
    """Functions and classes with docstrings, from the standard library and installed packages; nothing is imported.

    A row's prompt is the signature and body without any docstring, cut to `prompt_chars` characters at a line's end;
    its completion is the docstring's first paragraph; its client is the top-level module or package.

    With `rejected`, rows are preferences, whose chosen completion is that. The rejected one has its words in another
    order (`shuffled`), has it in lower case without the full stop (`plain`), or is another row's (`foreign`): the next
    one's in the order of hashes. Rows whose two completions would be equal are left out.
    """

    kind: Literal["python_docs"] = "python_docs"
    packages: tuple[str, ...] = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow")
    prompt_chars: int = 500
    # Without a place in the text that names a store, where only the fingerprint has it: earlier stores are used on.
    rejected: Rejected | None = field(default=None, repr=False)

    def fingerprint(self) -> str:
        """The versions of Python and of the packages, and what is rejected."""
        try:
            versions = [f"{package}=={version(package)}" for package in self.packages]
        except PackageNotFoundError as error:
            raise DataError(
                f"data.source.packages names {error.name!r}, which is not installed: "
                "install it or take it out of the list"
            ) from None
        kind = [f"rejected={self.rejected}"] if self.rejected else []
        return " ".join([f"python=={platform.python_version()}", *versions, *kind])

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in a fixed order, each prompt and completion once; with `rejected`, as preferences."""
        clients: dict[tuple[str, str], str] = {}
        for client, path in self._files():
            for row in documented(path, self.prompt_chars):
                clients.setdefault(row, client)
            on_rows(len(clients))
        rows = [(client, *row) for row, client in clients.items()]
        if self.rejected is None:
            return Rows(_table(rows, SCHEMA), {})
        answers = rejected_completions(list(clients), self.rejected)
        pairs = [(*row, answer) for row, answer in zip(rows, answers, strict=True) if row[-1] != answer]
        equal = len(rows) - len(pairs)
        return Rows(_table(pairs, PAIRS), {"would have equal chosen and rejected completions": equal} if equal else {})

    def _files(self) -> Iterator[tuple[str, Path]]:
        stdlib = Path(sysconfig.get_path("stdlib"))
        roots = [p for p in sorted(stdlib.iterdir()) if p.stem in sys.stdlib_module_names]
        for package in self.packages:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise DataError(f"data.source.packages names {package!r}, which has no source files here")
            roots.append(Path(spec.origin).parent)
        for root in roots:
            for path in [root] if root.suffix == ".py" else sorted(root.rglob("*.py")):
                if not SKIPPED_FOLDERS & set(path.relative_to(root.parent).parts):
                    yield root.stem, path


def _table(rows: Sequence[tuple[str, ...]], schema: pa.Schema) -> pa.Table:
    return pa.table([[row[place] for row in rows] for place in range(len(schema))], schema=schema)


def rejected_completions(rows: list[tuple[str, str]], kind: Rejected) -> list[str]:
    """A completion to reject for each (prompt, completion), a function of the contents alone; see `PythonDocs`."""
    if kind == "shuffled":
        return [_shuffled(*row) for row in rows]
    if kind == "plain":
        return [completion.lower().removesuffix(".") for _, completion in rows]
    order = sorted(rows, key=lambda row: sha256("".join(row).encode()).digest())
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[row][1] for row in rows]


def _shuffled(prompt: str, completion: str) -> str:
    """The completion with its words in another order, drawn from the row's hash; as it is if there is no other."""
    words = completion.split()
    draw = Random(prompt + completion)  # hashes its seed by SHA-512
    while len(set(words)) > 1 and " ".join(words) == completion:
        draw.shuffle(words)
    return " ".join(words)


def documented(path: Path, prompt_chars: int) -> Iterator[tuple[str, str]]:
    """The (prompt, completion) of each documented function and class of one file; none if it does not parse."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # broken on purpose, or not UTF-8: such files exist in installed packages
    lines = text.split("\n")  # as `ast` counts them: not at form feeds
    nodes = [node for node in ast.walk(tree) if isinstance(node, Definition) and ast.get_docstring(node) is not None]
    # Prompts hold no docstring: a method's completes another row. One on its signature's line cannot be cut out.
    nodes = [node for node in nodes if node.body[0].lineno != node.lineno]
    hidden = {number for node in nodes for number in _lines(node.body[0])}
    for node in nodes:
        paragraph = " ".join((ast.get_docstring(node) or "").strip().split("\n\n")[0].split())
        if not paragraph:
            continue
        kept = [lines[number - 1] for number in _lines(node) if number not in hidden]
        indent = node.col_offset
        code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in kept)
        if len(code) > prompt_chars:
            code = code[:prompt_chars].rsplit("\n", 1)[0]
        yield code.rstrip() + PROMPT_END, paragraph


def _lines(node: ast.stmt) -> range:
    """The lines of a piece of code, from 1."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)
