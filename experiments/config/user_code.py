"""What is the user's own: sources, partitions, strategies and rewards, imported from the working folder.

The recipe names a class or, of a reward, a function: `kind = "my_module:MyClass"`.
"""

import importlib
import inspect
import json
import re
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engine.messages.errors import RunError
from engine.objectives.reinforcement.rewards import Custom
from strategies.contract.checks import lacks

Place = tuple[str | int, ...]
# The sections that may name a user's class, with the methods that the class must have, and the shipped kind that stands
# in for it while the rest of the recipe is checked.
PLACES = {
    ("data", "source"): (("fingerprint", "load"), "python_docs"),
    ("data", "partition"): (("assign",), "natural"),
    ("strategy",): (("apply",), "fedavg"),
}
REWARDS = ("train", "objective", "rewards")  # a list, each of which may be a user's function
REWARD = {"kind": "balance"}  # stands in for one
COMBINED = ("first", "then")  # the partitions that a combined partition holds, at any depth
SHIPPED = ("datasets_partition", "strategies", "engine", "experiments")
MODULES: dict[str, str] = {}  # the user's modules that this process has imported: file -> name


def take_out(tree: dict[str, Any]) -> dict[Place, Any]:
    """Replaces the user's classes in a recipe's tree by shipped kinds, returns their objects; RunError on a fault."""
    objects: dict[Place, Any] = {}
    for root, (methods, stand_in) in PLACES.items():
        waiting: list[tuple[Any, Place]] = [(tree.get(root[0]) if root[1:] else tree, root)]
        while waiting:
            above, place = waiting.pop()
            section: Any = above.get(place[-1]) if isinstance(above, dict) else None
            kind = section.get("kind") if isinstance(section, dict) else None
            if kind == "combined":
                waiting += [(section, (*place, held)) for held in COMBINED]
            elif isinstance(kind, str) and ":" in kind:
                objects[place] = _made(".".join(map(str, place)), section, methods)
                above[place[-1]] = {"kind": stand_in}
    rewards: Any = tree
    for key in REWARDS:
        rewards = rewards.get(key) if isinstance(rewards, dict) else None
    for number, given in enumerate(rewards if isinstance(rewards, list) else []):
        if isinstance(given, dict) and ":" in str(given.get("kind")):
            objects[(*REWARDS, number)] = _reward(f"{'.'.join(REWARDS)}[{number}]", given)
            rewards[number] = REWARD
    return objects


def put_back(tree: dict[str, Any], recipe: Any) -> None:
    """Writes the user's objects of a recipe into its tree, under the kind that names their class or function."""
    for (*above, key), value in user_objects(recipe).items():
        section: Any = tree
        for key_above in above:
            section = section[key_above]
        code = code_of(value)
        section[key] = {"kind": None} | section[key] | {"kind": f"{code.__module__}:{code.__name__}"}  # the kind first


def code_of(value: Any) -> Any:
    """The class of a user's object, or the function that it holds."""
    return vars(value).get("function", type(value))


def user_objects(recipe: Any) -> dict[Place, Any]:
    """The objects of a recipe whose code is the user's, by place."""
    objects, waiting = dict[Place, Any](), list[tuple[Place, Any]]([((), recipe)])
    while waiting:
        place, value = waiting.pop(0)
        if is_dataclass(value) and code_of(value).__module__.split(".")[0] not in SHIPPED:
            objects[place] = value
        elif is_dataclass(value):
            waiting += [((*place, key.name), getattr(value, key.name)) for key in fields(value)]
        elif isinstance(value, tuple):
            waiting += [((*place, number), item) for number, item in enumerate(value)]
    return objects


def replaced(section: Any, place: Place, value: Any) -> Any:
    """A copy of a section of a recipe, with `value` at that place in it."""
    key, *below = place
    if isinstance(key, int):
        changed = replaced(section[key], tuple(below), value) if below else value
        return (*section[:key], changed, *section[key + 1 :])
    return replace(section, **{key: replaced(getattr(section, key), tuple(below), value) if below else value})


def _made(place: str, given: dict[str, Any], methods: Place) -> Any:
    kind = imported(f"{place}.kind", given["kind"], *methods)
    if missing := lacks(kind) if "apply" in methods else []:
        what = f"{place}.kind names {given['kind']!r}, which has no {', '.join(missing)}"
        remedy = "extend strategies.core.base.Rule, which has a default for all but apply"
        raise RunError(f"{what}: {remedy}, and run `fedpost strategies --check {given['kind']}`")
    keys = {key: value for key, value in given.items() if key != "kind"}
    try:
        return TypeAdapter(kind).validate_json(json.dumps(keys), strict=True, extra="forbid")
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "its keys"
        takes = ", ".join(key.name for key in fields(kind)) or "no keys"
        raise RunError(f"{place}, {given['kind']}: {where}: {fault['msg']}; it takes {takes}") from None


def _reward(place: str, given: dict[str, Any]) -> Custom:
    kind, weight = given["kind"], given.get("weight", 1.0)
    if others := sorted(given.keys() - {"kind", "weight"}):
        raise RunError(f"{place}, {kind}: a reward of your own takes weight alone, not {others[0]}")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RunError(f"{place}, {kind}: weight should be a number, not {weight!r}")
    return Custom(kind, reward_function(place, kind), float(weight))


def reward_function(place: str, kind: str) -> Any:
    """The function that "my_module:function" names; RunError if there is none that takes a reward's arguments."""
    function = _member(place, kind)
    try:
        inspect.signature(function).bind("prompt", "completion", {})
    except (TypeError, ValueError):
        raise RunError(f"{place} names {kind!r}, which is no function of (prompt, completion, row)") from None
    return function


def imported(place: str, kind: str, *methods: str) -> Any:
    """The dataclass that "my_module:MyClass" names; RunError if it cannot be imported or lacks one of the methods."""
    member = _member(place, kind)
    missing = [method for method in methods if method not in dir(member)]
    if not isinstance(member, type) or not is_dataclass(member) or missing:
        raise RunError(f"{place} names {kind!r}, which is no dataclass with a method {(missing or methods)[0]!r}")
    return member


def _member(place: str, kind: str) -> Any:
    """What "my_module:name" names, None if the module has no such name; RunError if it cannot be imported."""
    name, _, attribute = kind.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the command line starts from another folder
    try:
        module = importlib.import_module(name)
    except Exception as error:
        what = f"{place} names {kind!r}, but importing {name!r} fails ({type(error).__name__}: {error})"
        raise RunError(f"{what}: run from the folder that holds it, or fix it") from error
    if module.__file__ is not None and name.split(".")[0] not in SHIPPED:
        MODULES[module.__file__] = name
    return vars(module).get(attribute)


def line_at_fault(traceback: str) -> str | None:
    """The last line of a user's module in a traceback (text, as other processes send it), in words; None if none."""
    for file, line, function in reversed(re.findall(r'File "(.+?)", line (\d+), in (\S+)', traceback)):
        if file in MODULES:
            return f"your module {MODULES[file]}: {function}, line {line} of {file}"
    return None
