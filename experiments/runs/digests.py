"""Digests of what a run depends on besides its recipe, rows and versions: the base, all code, the trace."""

import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.objectives.templates import template_file, writes_the_date
from experiments.config.recipe import Recipe, located
from experiments.config.user_code import SHIPPED, code_of, user_objects

BASE = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"}  # files of a base's folder that are read
TEMPLATES = ("*.jinja", "tokenizer_config.json", "chat_template.json", "additional_chat_templates/*.jinja")
# A file of up to 16 MiB is read whole; of a larger file as much is read, in evenly spaced blocks. Retrained weights
# differ everywhere, and reading all of 140 GB would take minutes at each start.
BLOCK, BLOCKS = 65_536, 256


def digests(recipe: Recipe) -> dict[str, str]:
    """Digests by what they are of; a base on the hub has its commit, once it is on this machine."""
    recipe = located(recipe)
    trace, values = recipe.clients.availability.trace, dict[str, str]()
    try:
        values["the code of fedpost"] = code_digest()
        if base := base_digest(recipe.model):
            values["model.base"] = base
        for number, frozen in enumerate(recipe.train.objective.models):
            for key, name in {"": frozen.model, ".base": frozen.base}.items():
                model = replace(recipe.model, base=name or "", revision=frozen.revision)
                if name is not None and (of_model := base_digest(model)):
                    values[f"train.objective.models[{number}]{key}"] = of_model
        if (template := recipe.model.chat_template) and (file := template_file(template)):
            values["model.chat_template"] = file_digest(file)
        if trace is not None and Path(trace).is_file():  # otherwise reading the trace explains what is wrong
            values["clients.availability.trace"] = file_digest(Path(trace))
        for user_object in user_objects(recipe).values():
            if (code := sys.modules[code_of(user_object).__module__].__file__) is not None:
                values[f"the code of {code_of(user_object).__module__}"] = sha256(Path(code).read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"a file that the recipe names cannot be read ({error}): allow reading it") from error
    return values


def code_digest() -> str:
    """The digest of fedpost's own modules, the same in a checkout, a wheel, and a Ray job."""
    digest = sha256()
    for package in sorted(SHIPPED):
        root = Path(str(sys.modules[package].__file__)).parent
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if not name.startswith(".") and "/." not in name:  # an editor's copies
                digest.update(f"{package}/{name}\n".encode() + file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def base_digest(model: Model) -> str | None:
    """The digest of a base's folder, or its commit on the hub; None until that is on this machine."""
    folder = Path(model.base)
    if not folder.is_dir():
        snapshot = _snapshot(model)
        return None if snapshot is None else f"commit {snapshot.name}"
    files = sorted(path for path in folder.iterdir() if path.suffix in BASE and path.is_file())
    return sha256("".join(f"{path.name} {file_digest(path)}\n" for path in files).encode()).hexdigest()


def _snapshot(model: Model) -> Path | None:
    """The folder of a base from the hub, if it is on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    except HFValidationError:  # not a possible name on the hub: loading the base explains it
        return None
    return Path(config).parent if isinstance(config, str) else None


def asks_for_today(model: Model) -> bool:
    """Whether a chat template of the model may write today's date; also if the base is not on this machine yet."""
    if model.chat_template is not None and (file := template_file(model.chat_template)):
        files = [file]
    elif (folder := Path(model.base) if Path(model.base).is_dir() else _snapshot(model)) is None:
        return True
    else:
        files = [file for pattern in TEMPLATES for file in folder.glob(pattern)]
    return any(writes_the_date(file.read_text(encoding="utf-8", errors="replace")) for file in files)


def file_digest(file: Path) -> str:
    """The digest of a file, of a large one in parts."""
    size = file.stat().st_size
    is_small = size <= BLOCK * BLOCKS
    starts = range(0, size, BLOCK) if is_small else [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
    digest = sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in starts:
            opened.seek(start)
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()
