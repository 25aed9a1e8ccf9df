"""The runs of a recipe with `[sweep.variants.NAME]` tables: each table is a change to the rest of the recipe."""

import re
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

from engine.messages.errors import RunError
from experiments.config.recipe import Recipe, changed, parse_tree, read_tree

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def load_variants(path: Path, changes: list[str] | None = None, only: Collection[str] = ()) -> dict[str, Recipe]:
    """The recipes of a file's variants by name, all of them checked; RunError with a sentence for each mistake.

    `changes` hold for all of them; with `only` just these.
    """
    tree = changed(read_tree(path), changes)
    sweep = tree.pop("sweep", None)
    tables = sweep.get("variants") if isinstance(sweep, dict) else None
    if not isinstance(tables, dict) or not tables:
        raise RunError(f"{path} has no [sweep.variants.NAME] tables, each a change to the recipe: add some")
    if others := sorted(sweep.keys() - {"variants"}):
        raise RunError(f"{path}: [sweep] takes variants, not {others[0]!r}")
    if unknown := [name for name in only if name not in tables]:
        raise RunError(f"{path} has no variant {unknown[0]!r}; it has {', '.join(tables)}")
    recipes, faults = dict[str, Recipe](), list[str]()
    for name, table in tables.items():
        if only and name not in only:
            continue
        if not NAME.fullmatch(name) or not isinstance(table, dict):
            faults.append(
                f"{path}: the variant {name!r} becomes a folder: give it a table, and a name of letters, digits"
            )
            continue
        its = merged(tree, table)
        its["name"] = f"{tree.get('name', 'sweep')}-{name}"
        try:
            recipes[name] = parse_tree(its, f"{path}: the variant {name!r}")
        except RunError as error:
            sentences = str(error).splitlines()
            faults += [each if repr(name) in each else f"{path}: the variant {name!r}: {each}" for each in sentences]
    if faults:
        raise RunError("\n".join(faults))
    return recipes


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with changes: tables are merged, but one of another `kind` takes the whole place of the old."""
    result = deepcopy(tree)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, str) and isinstance(value, dict) and "kind" not in value:
            old = result[key] = {"kind": old}
        other_kind = isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind"))
        if isinstance(old, dict) and isinstance(value, dict) and other_kind == old.get("kind"):
            result[key] = merged(old, value)
        else:
            result[key] = deepcopy(value)
    return result
