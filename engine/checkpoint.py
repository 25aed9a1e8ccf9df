"""A run's state on disk: safetensors and JSON, never pickle; a checkpoint is there whole or not at all."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.atomic import write_folder
from strategies.types import ServerState

STATE, FACTS = "state.safetensors", "facts.json"


@dataclass(frozen=True)
class Saved:
    """What a resumed run starts from: the strategy's state, the seconds that the run had taken, and what privacy needs.

    `clip` is the next round's clipping norm, `aborts` how many rounds of secure aggregation had no result.
    """

    state: ServerState
    wall_s: float
    clip: float = 0.0
    aborts: int = 0


def save_checkpoint(folder: Path, saved: Saved, keep: int) -> None:
    """Writes `folder/NNNNN` for the state's round and removes all but the last `keep`."""
    for scratch in folder.glob(".*"):
        shutil.rmtree(scratch)  # of a process that was killed while it wrote
    state = saved.state
    tensors = {"params": state.params} | {f"moments.{name}": moment for name, moment in state.moments.items()}
    if state.residual is not None:
        tensors["residual"] = state.residual
    facts = {"round": state.round, "wall_s": saved.wall_s, "clip": saved.clip, "aborts": saved.aborts}
    write_folder(folder / f"{state.round:05d}", {STATE: save(tensors), FACTS: json.dumps(facts).encode()})
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, last: int | None = None) -> Saved | None:
    """The newest checkpoint of `folder` (up to round `last`), None without one; ValueError when it cannot be read."""
    found = [path for path in _checkpoints(folder) if last is None or int(path.name) <= last]
    if not found:
        return None
    try:
        tensors = load((found[-1] / STATE).read_bytes())
        facts = json.loads((found[-1] / FACTS).read_text(encoding="utf-8"))
        params, residual = tensors.pop("params"), tensors.pop("residual", None)
        moments = {name.removeprefix("moments."): tensor for name, tensor in tensors.items()}
        state = ServerState(int(facts["round"]), params, moments, residual)
        return Saved(state, float(facts["wall_s"]), float(facts["clip"]), int(facts["aborts"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {found[-1]} cannot be read ({error}): remove that folder to resume from the one before"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("[0-9]*") if path.is_dir()), key=lambda path: int(path.name))
