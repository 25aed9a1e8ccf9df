"""The shape of the source tree, read from its files: who imports whom, what `__init__.py` holds, names, sizes.

`complaints` takes one module's text and gives sentences; `upward` and `circles` take all imports. The tests below feed
them the tree, and planted violations to show that they bite.
"""

import ast
import configparser
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"ray", "transformers", "peft", "deepspeed"}
# Package: what no module of it may import. `tests` is in each: nothing that is shipped may need what is not.
FORBIDDEN = {
    "engine": {"experiments", "tests"},
    "strategies": {"engine", "datasets_partition", "experiments", "tests"} | HEAVY,
    "datasets_partition": {"engine", "strategies", "experiments", "tests", "ray", "torch", "transformers"},
    "experiments": {"tests"},
}
# The rooms of each package, from the top down: a room imports only rooms to its right.
ROOMS = {
    "engine": (
        *("rounds", "scheduling", "workers", "training", "models", "aggregation", "records", "config"),
        *("objectives", "messages", "system"),
    ),
    "strategies": (
        *("contract", "robust", "lora", "personalized", "averaging", "black_box", "zeroth_order", "transforms"),
        *("privacy", "secagg", "core"),
    ),
    "datasets_partition": ("store", "partitioners", "sources", "formats", "core"),
    "experiments": ("cli", "bench", "access", "sweep", "preflight", "runs", "report", "openness", "config"),
}
MAX_LINES = 400
MAX_FILES = 15  # Python files in a folder, besides __init__.py
OLDEST_PYTHON = (3, 11)  # a newer interpreter refuses newer syntax too, so that everybody sees it at once
# They shadow nothing, since no package's folder is ever on sys.path itself.
STDLIB_NAMES_IN_USE = {"types"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def dependencies() -> set[str]:
    """Import names of all dependencies and extras, taken from their distributions' names."""
    config = setup_cfg()
    listed = lines(config["options"]["install_requires"])
    for requirements in config["options.extras_require"].values():
        listed += lines(requirements)
    return {re.split(r"[^A-Za-z0-9_-]", line)[0].lower().replace("-", "_") for line in listed}


def sources() -> list[PurePosixPath]:
    """Every Python file of the packages, relative to the root."""
    files = (path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))
    return sorted(PurePosixPath(path.relative_to(ROOT).as_posix()) for path in files)


def imported(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, also inside functions, under TYPE_CHECKING, or by a call."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, name.name) for name in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield node.lineno, module
                yield from ((node.lineno, f"{module}.{name.name}") for name in node.names)
            case ast.ImportFrom(level=level, module=module):
                base = list(path.parent.parts)[: max(0, len(path.parent.parts) - level + 1)]
                yield from ((node.lineno, ".".join([*base, *filter(None, [module]), name.name])) for name in node.names)
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(str(name)), *_]):
                if called in {"import_module", "__import__"}:
                    yield node.lineno, name


def complaints(path: PurePosixPath, source: str, dependencies: set[str] = frozenset()) -> list[str]:
    """What is wrong with the module at `path` (relative to the root) that has this text; empty when nothing is."""
    try:
        tree = ast.parse(source, filename=str(path), feature_version=OLDEST_PYTHON)
    except SyntaxError as error:
        return [f"{path}:{error.lineno}: no Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} syntax: {error.msg}"]
    texts = []
    package = path.parts[0]
    for line, name in dict.fromkeys((line, name.split(".")[0]) for line, name in imported(path, tree)):
        if name in FORBIDDEN[package]:
            texts.append(f"{path}:{line}: {package} may not import {name}")

    if path.name == "__init__.py":
        allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)  # assignments: unions, __all__
        body = tree.body[1:] if ast.get_docstring(tree) else tree.body
        if ast.get_docstring(tree) is None:
            texts.append(f"{path}: has no docstring")
        for node in body:
            if not isinstance(node, allowed) or any(isinstance(inner, ast.Lambda) for inner in ast.walk(node)):
                texts.append(f"{path}:{node.lineno}: holds more than a docstring, imports and a union")

    if (length := len(source.splitlines())) > MAX_LINES:
        texts.append(f"{path}: {length} lines, more than {MAX_LINES}: it wants to be two files")
    for name in {*path.parts[:-1], path.stem} - {"__init__", "__main__"}:
        if name in dependencies:
            texts.append(f"{path}: {name} is a dependency's name")
        if name in sys.stdlib_module_names and name not in STDLIB_NAMES_IN_USE:
            texts.append(f"{path}: {name} is a name of the standard library")
    return texts


def module_of(path: PurePosixPath) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def graph_of(texts: Mapping[PurePosixPath, str]) -> dict[str, set[str]]:
    """Which of these modules each of them imports, wherever the import stands."""
    modules = {module_of(path) for path in texts}
    return {
        module_of(path): {name for _, name in imported(path, ast.parse(text)) if name in modules} - {module_of(path)}
        for path, text in texts.items()
    }


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports from a room into a room to its left, within one package."""
    texts = []
    for module, names in graph.items():
        package, room, *_ = [*module.split("."), ""]
        rooms = ROOMS[package]
        for name in sorted(names):
            other_package, other, *_ = [*name.split("."), ""]
            if package == other_package and room in rooms and other in rooms and rooms.index(other) < rooms.index(room):
                texts.append(f"{module} may not import {name}: {other} is above {room}")
    return texts


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or not. A package's `__init__` counts as a module."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        seen, waiting = set[str](), [module]
        while waiting:
            for name in graph[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        reached[module] = seen
    members = {module: sorted(name for name in seen if module in reached[name]) for module, seen in reached.items()}
    return sorted(map(list, {tuple(names) for names in members.values() if len(names) > 1}))


def tree() -> dict[PurePosixPath, str]:
    return {path: (ROOT / path).read_text("utf-8") for path in sources()}


def test_every_module_keeps_the_rules() -> None:
    known = dependencies()
    texts = [text for path, source in tree().items() for text in complaints(path, source, known)]
    assert not texts, "\n" + "\n".join(texts)


def test_rooms_import_only_rooms_to_their_right() -> None:
    texts = upward(graph_of(tree()))
    assert not texts, "\n" + "\n".join(texts)


def test_no_modules_import_one_another() -> None:
    assert circles(graph_of(tree())) == []


def test_every_folder_of_a_package_is_a_room_and_none_is_a_hall() -> None:
    for package, rooms in ROOMS.items():
        folders = {path.parts[1] for path in sources() if path.parts[0] == package and len(path.parts) > 2}
        assert folders == set(rooms), package
    counts = Counter(path.parent for path in sources() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_setup_cfg_lists_exactly_the_packages_on_disk() -> None:
    # Any folder with Python in it counts: one without __init__.py would be importable here and missing in a wheel.
    on_disk = {".".join(path.parent.parts) for path in sources()}
    for package in sorted(on_disk):
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file(), f"{package} has no __init__.py"
    assert set(lines(setup_cfg()["options"]["packages"])) == on_disk


def test_no_package_is_outside_the_rules() -> None:
    top = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert top == set(FORBIDDEN)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("engine/a.py", "import experiments.config", "engine may not import experiments"),
        ("engine/objectives/a.py", "from experiments import run", "engine may not import experiments"),
        ("strategies/a.py", "from engine.aggregation import exact_sum", "strategies may not import engine"),
        ("strategies/a.py", "def f():\n    import ray", "strategies/a.py:2: strategies may not import ray"),
        ("strategies/a.py", "import torch, peft.tuners", "strategies may not import peft"),
        ("strategies/a.py", "if TYPE_CHECKING:\n    from transformers import X", "may not import transformers"),
        ("strategies/a.py", "importlib.import_module('deepspeed')", "strategies may not import deepspeed"),
        ("strategies/secagg/a.py", "from ...engine import x", "strategies may not import engine"),
        ("datasets_partition/a.py", "import torch", "datasets_partition may not import torch"),
        ("datasets_partition/a.py", "from .. import strategies", "datasets_partition may not import strategies"),
        ("experiments/a.py", "from tests import helpers", "experiments may not import tests"),
        ("engine/__init__.py", '"""Doc."""\ndef f(): ...', "holds more than a docstring"),
        ("engine/__init__.py", '"""Doc."""\nf = lambda: 0', "holds more than a docstring"),
        ("engine/__init__.py", "import torch", "has no docstring"),
        ("engine/a.py", "x = 0\n" * 401, "401 lines, more than 400"),
        ("engine/a.py", "def f[T](x: T) -> T: ...", "engine/a.py:1: no Python 3.11 syntax"),
        ("engine/torch.py", "", "torch is a dependency's name"),
        ("engine/logging.py", "", "logging is a name of the standard library"),
        ("experiments/queue/a.py", "", "queue is a name of the standard library"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, expected: str) -> None:
    texts = complaints(PurePosixPath(path), source, {"torch"})
    assert len(texts) == 1
    assert expected in texts[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/a.py", "import ray\nfrom strategies.core.protocol import Update\n" + "x = 0\n" * 398),
        ("strategies/a.py", "import torch\nfrom strategies.core import layout\nfrom . import seeds"),
        ("strategies/types.py", "import types"),
        ("strategies/__init__.py", '"""Doc."""\nfrom strategies.averaging.fedavg import FedAvg\n\nS = FedAvg | None'),
        ("datasets_partition/a.py", "import pyarrow\nimport datasets"),
        ("experiments/__main__.py", "import engine.rounds.driver\nimport strategies"),
        ("engine/a.py", "'import experiments'  # import experiments"),
    ],
)
def test_what_the_rules_allow_passes(path: str, source: str) -> None:
    assert complaints(PurePosixPath(path), source, {"torch"}) == []


def test_a_planted_import_of_a_higher_room_or_in_a_circle_is_found() -> None:
    texts = {
        PurePosixPath("engine/system/a.py"): "from engine.rounds import b",
        PurePosixPath("engine/rounds/b.py"): "import engine.rounds.c",
        PurePosixPath("engine/rounds/c.py"): "if TYPE_CHECKING:\n    from engine.rounds.b import x",
    }
    graph = graph_of(texts)
    assert upward(graph) == ["engine.system.a may not import engine.rounds.b: rounds is above system"]
    assert circles(graph) == [["engine.rounds.b", "engine.rounds.c"]]


def test_dependencies_are_import_names() -> None:
    assert {"ray", "torch", "tomli_w", "pytest", "flash_attn", "flwr_datasets"} <= dependencies()


def test_no_test_file_is_too_long_either() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: count for name, count in long.items() if count > MAX_LINES} == {}
