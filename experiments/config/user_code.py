"""People's own sources, partitioners and strategies: `kind = "my_module:MyClass"`, found from the working folder."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from strategies.contract.checks import lacks

if TYPE_CHECKING:
    from experiments.config.recipe import Recipe

Place = tuple[str, ...]
# Where a recipe takes them, with the methods that they must have, and a shipped kind that stands in while the rest of
# the recipe is checked.
PLACES = {
    ("data", "source"): (("fingerprint", "load"), "python_docs"),
    ("data", "partition"): (("assign",), "natural"),
    ("strategy",): (("apply",), "fedavg"),
}
COMBINED = ("first", "then")  # what a combined partition holds: partitions again, at any depth
SHIPPED = ("datasets_partition", "strategies", "engine", "experiments")


def take_out(tree: dict[str, Any]) -> dict[Place, Any]:
    """Replaces own sections of a recipe's tree by shipped ones; returns the objects that they stand for, by place.

    Raises ValueError if a module or class cannot be had, or does not take the keys.
    """
    own: dict[Place, Any] = {}
    for (*above, key), (methods, stand_in) in PLACES.items():
        section: Any = tree
        for part in above:
            section = section.get(part) if isinstance(section, dict) else None
        _take_out(section, (*above, key), methods, stand_in, own)
    return own


def _take_out(section: Any, place: Place, methods: Place, stand_in: str, own: dict[Place, Any]) -> None:
    given = section.get(place[-1]) if isinstance(section, dict) else None
    if not isinstance(given, dict):
        return
    if isinstance(given.get("kind"), str) and ":" in given["kind"]:
        own[place] = _made(".".join(place), given, methods)
        section[place[-1]] = {"kind": stand_in}
    elif given.get("kind") == "combined":
        for part in COMBINED:
            _take_out(given, (*place, part), methods, stand_in, own)


def put_back(tree: dict[str, Any], recipe: "Recipe") -> None:
    """Writes own objects of a recipe into its tree, under the kind by which they were named."""
    for (*above, key), value in own_parts(recipe).items():
        section, kind = tree, type(value)
        for part in above:
            section = section[part]
        keys = {name: value for name, value in section[key].items() if name != "kind"}
        section[key] = {"kind": f"{kind.__module__}:{kind.__name__}", **keys}


def own_parts(recipe: "Recipe") -> dict[Place, Any]:
    """The own objects of a recipe, by place."""
    return dict(_own_parts(recipe, ()))


def _own_parts(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if is_dataclass(value) and not _is_shipped(value):
        yield place, value
    elif is_dataclass(value):
        for key in fields(value):
            yield from _own_parts(getattr(value, key.name), (*place, key.name))


def _is_shipped(value: object) -> bool:
    return type(value).__module__.split(".")[0] in SHIPPED


def replaced(section: Any, place: Place, value: Any) -> Any:
    """A copy of a section of a recipe, with `value` at that place in it."""
    key, *below = place
    return replace(section, **{key: replaced(getattr(section, key), tuple(below), value) if below else value})


def _made(place: str, given: dict[str, Any], methods: Place) -> Any:
    kind = imported(f"{place}.kind", given["kind"], *methods)
    missing = lacks(kind) if "apply" in methods else []
    if missing:
        raise ValueError(
            f"{place}.kind names {given['kind']!r}, which has no {', '.join(missing)}: extend "
            f"strategies.core.base.Rule (a default for everything but apply), and try it by `fedpost strategies "
            f"--check {given['kind']}`"
        )
    keys = {key: value for key, value in given.items() if key != "kind"}
    try:
        return TypeAdapter(kind).validate_json(json.dumps(keys), strict=True, extra="forbid")
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "its keys"
        takes = ", ".join(key.name for key in fields(kind)) or "no keys"
        raise ValueError(f"{place}, {given['kind']}: {where}: {fault['msg']}; it takes {takes}") from None


def imported(place: str, kind: str, *methods: str) -> Any:
    """The dataclass that "my_module:MyClass" names; ValueError unless it can be had and has the methods."""
    name, _, attribute = kind.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the command line starts from a folder of its own
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"{place} names {kind!r}, but importing {name!r} fails ({type(error).__name__}: {error}): "
            f"run from the folder that holds it, or mend it"
        ) from error
    found = vars(module).get(attribute)
    missing = [method for method in methods if method not in dir(found)]
    if not isinstance(found, type) or not is_dataclass(found) or missing:
        raise ValueError(f"{place} names {kind!r}, which is no dataclass with a method {(missing or methods)[0]!r}")
    return found
