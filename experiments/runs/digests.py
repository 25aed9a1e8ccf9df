"""What a run rests on beside its recipe, its rows and its versions, told by digests: the base, own code, the trace."""

import sys
from hashlib import sha256
from pathlib import Path

from engine.config.federation import Model
from engine.messages.errors import RunError
from experiments.config.recipe import Recipe, located
from experiments.config.user_code import user_parts

BASE = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"}  # what of a base's folder is ever read
# All of a file of up to 16 MiB, and as much of a larger one, evenly spread: weights that are trained anew differ
# everywhere, in sizes and headers nowhere, and to read all of 140 GB takes minutes at each start.
BLOCK, BLOCKS = 65_536, 256


def digests(recipe: Recipe) -> dict[str, str]:
    """Digests by what they are of; a base that the hub gives has its commit, once it is on this machine."""
    recipe = located(recipe)
    base, trace = _base(recipe.model), recipe.clients.availability.trace
    found = {} if base is None else {"model.base": base}
    try:
        if trace is not None and Path(trace).is_file():  # who needs it says what is wrong with it
            found["clients.availability.trace"] = _digest(Path(trace))
        for part in user_parts(recipe).values():
            code = sys.modules[type(part).__module__].__file__
            if code is not None:
                found[f"the code of {type(part).__module__}"] = sha256(Path(code).read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"what the recipe names cannot be read ({error}): give leave to read it") from error
    return found


def _base(model: Model) -> str | None:
    folder = Path(model.base)
    if not folder.is_dir():
        return _commit(model)
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in BASE and path.is_file())
        return sha256("".join(f"{path.name} {_digest(path)}\n" for path in files).encode()).hexdigest()
    except OSError as error:
        raise RunError(f"model.base {model.base!r} cannot be read ({error}): give leave to read it") from error


def _commit(model: Model) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    except ValueError:  # no name that the hub could know: who loads the base says so
        return None
    return f"commit {Path(config).parent.name}" if isinstance(config, str) else None


def _digest(file: Path) -> str:
    size = file.stat().st_size
    whole = size <= BLOCK * BLOCKS
    starts = range(0, size, BLOCK) if whole else [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
    found = sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in starts:
            opened.seek(start)
            found.update(opened.read(BLOCK))
    return found.hexdigest()
