"""What rounds begin from by `model.start`: an earlier run, its model, or a PEFT adapter, here or at a URI."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow import fs

from datasets_partition.sources.location import first_line, is_local, node_cache
from datasets_partition.sources.location import located as file_system
from engine.messages.errors import RunError
from experiments.config.recipe import Recipe, located
from experiments.runs.digests import base_digest, file_digest
from experiments.runs.resuming import facts_of

ADAPTER = "adapter_config.json"
READ = (".json", ".safetensors", ".jinja", ".model")
# What two configurations of one architecture and size agree in.
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


@contextmanager
def started(recipe: Recipe) -> Iterator[tuple[Recipe, dict[str, str]]]:
    """Yields the recipe with a local folder as start, and its digest by name; RunError for a start that does not fit.

    What a URI holds is copied, and the copy removed at the end.
    """
    start = recipe.model.start
    if start is None:
        yield recipe, {}
        return
    with _fetched(start) as (folder, manifest):
        _check(recipe, folder, manifest)
        files = sorted(path for path in folder.iterdir() if path.suffix in READ and path.is_file())
        digest = sha256("".join(f"{path.name} {file_digest(path)}\n" for path in files).encode()).hexdigest()
        yield replace(recipe, model=replace(recipe.model, start=str(folder))), {"model.start": digest}


@contextmanager
def _fetched(location: str) -> Iterator[tuple[Path, Path]]:
    """Yields the local folder of a start's files, and the manifest of its run, which need not be there."""
    if is_local(location):
        path = Path(location).expanduser().resolve()
        if not path.is_dir():
            what = f"model.start is {location!r}, and there is no folder {path}"
            raise RunError(f"{what}: name a run's folder, or a PEFT adapter's (relative paths start at this folder)")
        run = path if (path / "recipe.toml").is_file() else path.parent
        folder = path / "model" if run == path else path
        if not folder.is_dir():
            raise RunError(f"the run in {path} (model.start) has no model yet: continue it with --resume first")
        is_run = (run / "recipe.toml").is_file() and folder == run / "model"
        yield folder, run / "manifest.json" if is_run else folder / "manifest.json"
        return
    home = node_cache() / "starts"
    home.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=home) as name:
        folder, system_path = Path(name), file_system(location)
        try:
            manifest = _copied(*system_path, folder)
        except OSError as error:
            raise RunError(f"model.start is {location!r}, which cannot be read: {first_line(error)}") from error
        if not (folder / "model").is_dir():
            raise RunError(f"model.start is {location!r}, where there is no run with a model and no PEFT adapter")
        yield folder / "model", manifest


def _copied(system: fs.FileSystem, path: str, folder: Path) -> Path:
    """Copies what a start needs below `folder`; returns where its run's manifest would be."""

    def names(below: str) -> set[str]:
        infos = system.get_file_info(fs.FileSelector(below, allow_not_found=True))
        return {PurePosixPath(info.path).name for info in infos if info.type == fs.FileType.File}

    path = path.rstrip("/")
    run = path if "recipe.toml" in names(path) else str(PurePosixPath(path).parent)
    model = f"{path}/model" if run == path else path
    wanted = {f"{model}/{name}": folder / "model" / name for name in names(model) if name.endswith(READ)}
    if "recipe.toml" in names(run) and "manifest.json" in names(run):
        wanted[f"{run}/manifest.json"] = folder / "manifest.json"
    for source, target in wanted.items():
        target.parent.mkdir(exist_ok=True)
        fs.copy_files(source, str(target), system, fs.LocalFileSystem())
    return folder / "manifest.json"


def _check(recipe: Recipe, folder: Path, manifest: Path) -> None:
    """Raises RunError if a start is of another kind than what the recipe trains, or of another base."""
    start, is_adapter, trains_adapter = recipe.model.start, (folder / ADAPTER).is_file(), recipe.model.peft.peft_class
    if not is_adapter and not (folder / "config.json").is_file():
        raise RunError(f"model.start is {start!r}, which holds neither a PEFT adapter nor a model")
    if trains_adapter and not is_adapter:
        what = f"model.start is {start!r}, a whole model, and the recipe trains an adapter"
        raise RunError(f"{what}: set model.base to {folder}, and leave model.start out")
    if is_adapter and not trains_adapter:
        what = f"model.start is {start!r}, an adapter, and the recipe trains all weights"
        raise RunError(f'{what}: train an adapter (model.peft = "lora"), or merge it into its base first')
    if is_adapter and not (folder / "adapter_model.safetensors").is_file():
        what = f"model.start is {start!r}, which has no adapter_model.safetensors, and pickled files are not read"
        raise RunError(f"{what}: save the adapter again with PEFT")
    model = located(recipe).model
    now, before = base_digest(model), facts_of(manifest).get("digests.model.base")
    if isinstance(before, str) and now and before.startswith("commit ") == now.startswith("commit ") and before != now:
        name = facts_of(manifest).get("base.name")
        what = f"model.start is {start!r}, which was trained on another base ({name}) than the recipe's {model.base}"
        raise RunError(f"{what}: set model.base to that")
    if not is_adapter:
        ours, theirs = _json(Path(model.base) / "config.json"), _json(folder / "config.json")
        if other := [key for key in SIZES if key in ours and ours[key] != theirs.get(key)]:
            what = f"model.start is {start!r}, a model of another {' and '.join(other)} than model.base"
            raise RunError(f"{what}: set model.base to it, and leave model.start out")


def _json(file: Path) -> dict[str, Any]:
    """The values of a JSON file; none if it is missing or damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}
