"""The recipe as one typed tree: read from strict TOML, changed by `a.b=c`, checked as a whole, written back resolved.

Imports neither ray nor transformers, so that `fedpost schema` and the errors of a recipe appear at once.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError

from datasets_partition import Partitioners, Sources
from datasets_partition.partitioners.natural import Natural
from datasets_partition.store.splits import Splits
from engine.config.access import ReplaceBase
from engine.config.adapters import REFUSED_KINDS
from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from experiments.config.user_code import COMBINED, put_back, replaced, take_out
from strategies import Strategies

SHIPPED = {"tiny": Path(__file__).parent.parent / "models" / "tiny"}
RECIPES = Path(__file__).parent.parent / "recipes"
ADAPTER = "adapter_config.json"
# Sections that may be given by their kind alone: strategy = "fedavg".
BY_KIND = (
    *(("data", "source"), ("data", "partition"), ("model", "peft"), ("cohort",)),
    *(("train", "objective"), ("train", "optimizer"), ("strategy",), ("privacy", "dp")),
)
CAPPED = "a client's weight is min(rows, rows_cap) / rows_cap: set privacy.rows_cap, a number of rows"
GONE = {
    "privacy.secagg.weight_cap": CAPPED,
    "privacy.dp.weight_cap": CAPPED,
    "privacy.secagg.neighbours": "the number of neighbors in the graph is privacy.secagg.neighbors now",
    "clients.pack": "how many clients train at once in a slot is clients.lanes now",
}


@dataclass(frozen=True)
class Data:
    """Where rows come from, which client has which, which are held back from training, and the folder of stores."""

    source: Annotated[Sources, Field(discriminator="kind")]
    partition: Annotated[Partitioners, Field(discriminator="kind")] = field(default_factory=Natural)
    splits: Splits = field(default_factory=Splits)
    label: str | None = None  # the column whose values are counted for each client; None: what the partition goes by
    cache: str = "runs/stores"


@dataclass(frozen=True)
class Gate:
    """The file of clients' policies on bases (docs/gate.md), and other `bases` that are tried on them too."""

    policy: str | None = None
    bases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe(Federation):
    """Everything that defines a run."""

    data: Data
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        super().__post_init__()
        clients = vars(self.data.partition).get("clients")  # of kinds that make a given number
        if clients is not None and self.cohort.size is not None and self.cohort.size > clients:
            what = f"cohort.size is {self.cohort.size:g}, but the partition makes only {clients} clients"
            raise RunError(f"{what}: lower it, or raise data.partition.clients")
        if self.gate.policy is not None and self.data.splits.server:
            raise RunError(
                "gate.policy leaves out clients, and the server's rows are drawn before there are any: set "
                "data.splits.server = 0"
            )


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def load_recipe(path: Path, changes: list[str] | None = None) -> Recipe:
    """The recipe of a TOML file with changes such as "train.steps=4"; RunError with one sentence per mistake."""
    return parse_tree(changed(read_tree(path), changes), str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """The tables of a recipe's file; RunError if it is missing or no TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in RECIPES.glob("*.toml")], 1, 0.3)
        hint = f"; the shipped recipes are in {RECIPES}, the nearest is {near[0]}" if near else ""
        raise RunError(f"there is no recipe {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the recipe {path} cannot be read: {error}") from error
    return _tables(text, str(path))


def parse_recipe(text: str, changes: list[str] | None = None, origin: str = "the recipe") -> Recipe:
    """The recipe of a TOML text, which errors call `origin`; otherwise as `load_recipe`."""
    return parse_tree(changed(_tables(text, origin), changes), origin)


def _tables(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise RunError(f"{origin} is nested too deeply to be a recipe") from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise RunError(f"{origin} is not valid TOML: {error}") from error


def changed(tree: dict[str, Any], changes: list[str] | None) -> dict[str, Any]:
    """The tree with changes such as "train.steps=4", made in place."""
    for change in changes or []:
        _change(tree, change)
    return tree


def parse_tree(tree: dict[str, Any], origin: str) -> Recipe:
    """The recipe of its tables; otherwise as `load_recipe`."""
    if "sweep" in tree:
        raise RunError(f"{origin} has [sweep], several runs from one recipe: run it with `fedpost access`")
    try:
        if isinstance(tree.get("cohort"), dict):
            tree["cohort"].setdefault("kind", "uniform")
        for path in BY_KIND:
            _expand(tree, *path)
        objects = take_out(tree)
        _fill_pair(tree, objects.get(("strategy",)))
        # Through JSON: only there does strict mode take tables for dataclasses and arrays for tuples.
        recipe = _ADAPTER.validate_json(json.dumps(tree, default=_no_date), strict=True, extra="forbid")
    except RecursionError:
        raise RunError(f"{origin} is nested too deeply to be a recipe") from None
    except ValidationError as error:
        raise RunError("\n".join(f"{origin}: {sentence}" for sentence in _sentences(error.errors()))) from None
    for place, value in objects.items():
        recipe = replaced(recipe, place, value)
    return recipe


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return _ADAPTER.json_schema()


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe: every key with its value; keys that are unset (null) are left out."""
    tree = _set_keys(json.loads(_ADAPTER.dump_json(recipe, warnings=False)))
    tree["strategy"] = {"kind": None} | tree["strategy"]  # first, as in the other sections
    put_back(tree, recipe)
    tables = {key: value for key, value in tree.items() if isinstance(value, dict)}
    return tomli_w.dumps({key: value for key, value in tree.items() if key not in tables} | tables)


def _set_keys(tree: Any) -> Any:
    """The tree without keys that are null, which pydantic leaves in beside a user's objects."""
    if isinstance(tree, dict):
        return {key: _set_keys(value) for key, value in tree.items() if value is not None}
    return [_set_keys(item) for item in tree] if isinstance(tree, list) else tree


def located(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of its trace, chat template and models' folders: processes have other folders.

    RunError for a model that is neither a folder nor a possible name on the hub.
    """
    clients, trace = recipe.clients, recipe.clients.availability.trace
    path, objective = _model_path("model.base", recipe.model.base), recipe.train.objective
    frozen = [_located_model(f"the model of train.objective = {objective.kind!r}", model) for model in objective.models]
    train = replace(recipe.train, objective=objective.with_models(frozen))
    if trace is not None:
        trace = str(Path(trace).expanduser().resolve())
        clients = replace(clients, availability=replace(clients.availability, trace=trace))
    template = recipe.model.chat_template
    if template is not None and Path(template).expanduser().is_file():
        template = str(Path(template).expanduser().resolve())
    access = recipe.model.access
    events = (
        replace(event, to=_model_path("model.access.events", event.to)) if isinstance(event, ReplaceBase) else event
        for event in access.events
    )
    access = replace(access, events=tuple(events))
    model = replace(recipe.model, base=path, chat_template=template, access=access)
    return replace(recipe, model=model, clients=clients, train=train)


def _model_path(key: str, name: str) -> str:
    folder = SHIPPED.get(name, Path(name).expanduser())
    if not folder.is_dir() and (name.count("/") > 1 or name.startswith(("/", "./", "../", "~"))):  # no name on the hub
        where = f"there is no folder {folder.absolute()} (relative paths start at the folder that the command runs in)"
        raise RunError(f"{key} is {name!r}, and {where}: correct the path, or give a name on the Hugging Face hub")
    return str(folder.resolve()) if folder.is_dir() else name


def _located_model(key: str, frozen: FrozenModel) -> FrozenModel:
    """The model with its folder's absolute path, and the base of an adapter; of a run it is what that has trained."""
    folder = Path(_model_path(key, frozen.model))
    if not folder.is_dir():
        return frozen
    run = folder if (folder / "recipe.toml").is_file() else folder.parent
    if run == folder:
        folder = run / "model"
        if not folder.is_dir():
            raise RunError(f"{key} is the run {run}, which has no model yet: continue it with --resume first")
    if not (folder / ADAPTER).is_file():
        return replace(frozen, model=str(folder))
    base, revision = frozen.base, frozen.revision
    if base is None:
        try:
            if folder == run / "model" and (run / "recipe.toml").is_file():
                named = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))["model"]
                base, revision = named["base"], named.get("revision")
            else:
                named = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
                base, revision = named["base_model_name_or_path"], named.get("revision")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(f"{key} is the adapter {folder}, which names no base ({error}): name it") from error
    return replace(frozen, model=str(folder), base=_model_path(f"the base of {folder}", base), revision=revision)


def _change(tree: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise RunError(f"--set takes a.b=value, not {change!r}")
    *path, last = key.strip().split(".")
    table = tree
    for name in path:
        below = table.setdefault(name, {})
        if isinstance(below, str):  # the short form: strategy = "fedavg"
            below = table[name] = {"kind": below}
        if not isinstance(below, dict):
            raise RunError(f"--set {change}: {name} is a value, not a section")
        table = below
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = value  # a bare word is a string, so that a shell needs no quotes
    except (RecursionError, ValueError) as error:
        raise RunError(f"--set {key} cannot be read: {error}") from None


def _fill_pair(tree: dict[str, Any], user_rule: Any) -> None:
    """Adds the kind of model.peft that a rule tunes, or a rule for such a kind, where the recipe names one of them."""
    rules, first_rule = [rule() for rule in get_args(Strategies)], dict[str, str]()
    for rule in rules:
        for kind in rule.tunes:
            first_rule.setdefault(kind, rule.kind)
    model = tree.get("model")
    strategy, peft = tree.get("strategy"), model.get("peft") if isinstance(model, dict) else None
    if user_rule is not None and user_rule.tunes:  # a shipped rule for the same kind stands in for it
        tree["strategy"] = {"kind": first_rule[user_rule.tunes[0]]}
        tunes = user_rule.tunes
    else:
        kind = strategy.get("kind") if isinstance(strategy, dict) else None
        tunes = next((rule.tunes for rule in rules if rule.kind == kind), ())
    if tunes and peft is None and isinstance(model, dict):
        model["peft"] = {"kind": tunes[0]}
    its_kind = str(peft.get("kind")) if isinstance(peft, dict) else ""
    if strategy is None and its_kind in first_rule:
        tree["strategy"] = {"kind": first_rule[its_kind]}


def _no_date(value: object) -> object:
    raise RunError(f"a recipe has no dates or times, but this holds {value}: put it in quotes if it is text")


def _expand(tree: Any, key: str, *below: str) -> None:
    section = tree.get(key) if isinstance(tree, dict) else None
    if below:
        _expand(section, *below)
    elif isinstance(section, str):
        tree[key] = {"kind": section}
    elif isinstance(section, dict) and section.get("kind") == "combined":
        for held in COMBINED:
            _expand(section, held)


def _sentences(faults: list[Any]) -> list[str]:
    """One sentence per key, also where a value may be of several types and fits none."""
    by_key: dict[str, list[Any]] = {}
    for fault in faults:
        by_key.setdefault(".".join(_walk(fault["loc"])[0]), []).append(fault)
    sentences = []
    for key, several in by_key.items():
        items = [fault for fault in several if fault["loc"] and isinstance(fault["loc"][-1], int)]
        several = items or several  # the faulty item of a list says more than that the list is none of the choices
        several = [fault for fault in several if fault["type"] == "value_error"] or several
        sentences.append(_sentence(key, several))
    return sentences


def _sentence(key: str, faults: list[Any]) -> str:
    fault = faults[0]
    kind = fault["type"]
    if key in GONE:
        return f"there is no key {key!r} any more; {GONE[key]}"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        kind_above, section = _walk(fault["loc"][:-1])[1], key.rpartition(".")[0]
        known = [f.name for member in _members(kind_above) for f in fields(member)]
        last = str(fault["loc"][-1])
        names = [getattr(member, "peft_names", {}) for member in _members(kind_above)]
        aliases = {name: key for keys in names for key, name in keys.items()}
        near = [aliases[last]] if last in aliases else _near(last, known, [*_keys(kind_above, section)])
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        choices = _members(_walk(fault["loc"][:-2])[1]) if len(fault["loc"]) > 1 else []
        if able := [repr(choice.kind) for choice in choices if last in {f.name for f in fields(choice)}]:
            hint = f"{section}.kind = {' or '.join(able)} has it. "
        return f"there is no key {key!r}; {hint}{f'[{section}]' if section else 'A recipe'} takes {', '.join(known)}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"the key {key!r} is missing"
    if kind == "union_tag_not_found":
        kinds = " or ".join(repr(member.kind) for member in _members(_walk(fault["loc"])[1]))
        return f"{key!r} needs a kind: {kinds}"
    if kind == "union_tag_invalid":
        tag, expected = fault["ctx"]["tag"], fault["ctx"]["expected_tags"]
        if key == "model.peft" and tag in REFUSED_KINDS:
            return f"model.peft has no kind {tag!r}, which {REFUSED_KINDS[tag]}"
        near = difflib.get_close_matches(tag.lower(), [each.strip().strip("'") for each in expected.split(",")], 1, 0.0)
        return f"{key!r} has no kind {tag!r}; did you mean {near[0]!r}? There is {expected}"
    if kind == "value_error":
        text = str(fault["ctx"]["error"])
        return text.replace("data.partition", key) if key.startswith("data.partition.") else text
    allowed = re.findall(r"'([^']*)'", fault["msg"]) if kind == "literal_error" else []
    near = difflib.get_close_matches(str(fault["input"]).lower(), allowed, 1, 0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    complaints = " or ".join(dict.fromkeys(map(_complaint, faults)))
    return f"{key!r} should be {complaints}, not {fault['input']!r}{hint}"


def _near(wrong: str, known: list[str], below: list[str]) -> list[str]:
    """What a key may have meant: one of its section's `known` keys, or keys `below` or elsewhere, with their paths."""

    def ending(names: list[str], paths: list[str]) -> list[str]:
        return [path for path in dict.fromkeys(paths) if path.rpartition(".")[2] in names][:3]

    def alike(paths: list[str], cutoff: float) -> list[str]:
        return difflib.get_close_matches(wrong, {path.rpartition(".")[2] for path in paths}, 1, cutoff)

    def begun(names: list[str]) -> list[str]:
        near = difflib.get_close_matches(wrong, {name.partition("_")[0] for name in names}, 1, 0.8)
        return [name for name in names if name.partition("_")[0] in near][:3]

    return (
        ending([wrong], below)
        or alike(known, 0.6)
        or begun(known)
        or ending([wrong], [*_keys(Recipe)])
        or ending(alike(below, 0.75), below)
    )


def _keys(kind: Any, path: str = "", above: tuple[Any, ...] = ()) -> Iterator[str]:
    """The dotted keys at and below a field of this type, each section of a kind once on the way down."""
    for member in _members(kind):
        hints = get_type_hints(member, include_extras=True)
        for key in (f.name for f in fields(member) if member not in above):
            yield (place := f"{path}.{key}" if path else key)
            yield from _keys(hints[key], place, (*above, member))


def _complaint(fault: Any) -> str:
    return str(fault["msg"]).removeprefix("Input should be ").replace("an object", "a section")


def _walk(where: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The TOML keys of one of pydantic's places, which also name choices of unions, and the type of what is there."""
    path: list[str] = []
    kind: Any = Recipe
    for step in where:
        members = _members(kind)
        tagged = [member for member in members if getattr(member, "kind", None) == step]
        if len(members) > 1 and tagged:
            kind = tagged[0]
            continue
        if path and not members:
            break
        path.append(str(step))
        if not isinstance(step, int):  # an item of a list, whose type is the list's
            kind = get_type_hints(members[0], include_extras=True).get(step)
    return path, kind


def _members(kind: Any) -> list[Any]:
    """The dataclasses that a field's type admits."""
    while get_origin(kind) in (Annotated, tuple):
        kind = get_args(kind)[0]
    choices = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return [choice for choice in choices if is_dataclass(choice)]
