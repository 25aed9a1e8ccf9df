"""A run's state on disk: safetensors and JSON, never pickle; a checkpoint is there whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.atomic import write_folder
from engine.wire import ShardedState, WireState, borrow
from strategies.types import ServerState

STATE, SHARD, FACTS = "state.safetensors", "shard-{:05d}.safetensors", "facts.json"
State = ServerState | ShardedState


@dataclass(frozen=True)
class Saved:
    """What a resumed run starts from: the strategy's state, the seconds that the run had taken, and what privacy needs.

    `clip` is the next round's clipping norm, `aborts` how many rounds of secure aggregation had no result. Packs have
    so many `lanes`; `costs` is what is known of how long clients take.
    """

    state: State
    wall_s: float
    clip: float = 0.0
    aborts: int = 0
    lanes: int = 1
    costs: list[float] = field(default_factory=list)


def save_checkpoint(folder: Path, saved: Saved, keep: int) -> None:
    """Writes `folder/NNNNN` for the state's round and removes all but the last `keep`."""
    for scratch in folder.glob(".*"):
        shutil.rmtree(scratch)  # of a process that was killed while it wrote
    round_ = saved.state.round
    facts = {name: value for name, value in vars(saved).items() if name != "state"} | {"round": round_}
    write_folder(folder / f"{round_:05d}", _files(saved.state, json.dumps(facts).encode()))
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, last: int | None = None) -> Saved | None:
    """The newest checkpoint of `folder` (up to round `last`), None without one; ValueError when it cannot be read."""
    found = [path for path in _checkpoints(folder) if last is None or int(path.name) <= last]
    if not found:
        return None
    try:
        facts = json.loads((found[-1] / FACTS).read_text(encoding="utf-8"))
        state = _read(found[-1], int(facts["round"]))
        figures = float(facts["wall_s"]), float(facts["clip"]), int(facts["aborts"]), int(facts["lanes"])
        return Saved(state, *figures, [float(cost) for cost in facts["costs"]])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {found[-1]} cannot be read ({error}): remove that folder to resume from the one before"
        ) from error


def _files(state: State, facts: bytes) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint one after another: of a state in shards, one shard at a time is in this process."""
    yield FACTS, facts
    if isinstance(state, ServerState):
        residual = {} if state.residual is None else {"residual": state.residual}
        yield STATE, save({"params": state.params} | _named(state.moments) | residual)
        return
    for rank, part in enumerate(state.parts):
        shard: WireState = ray.get(part)
        moments = {name: borrow(moment) for name, moment in shard.moments.items()}
        yield SHARD.format(rank), save({"params": borrow(shard.params)} | _named(moments))


def _named(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"moments.{name}": moment for name, moment in moments.items()}


def _read(folder: Path, round_: int) -> State:
    shards = sorted(folder.glob("shard-*"))
    if not shards:
        params, moments, residual = _tensors(folder / STATE)
        return ServerState(round_, params, moments, residual)
    parts = []
    for path in shards:
        params, moments, _ = _tensors(path)
        parts.append(ray.put(WireState(params.numpy(), {name: moment.numpy() for name, moment in moments.items()})))
    return ShardedState(round_, tuple(parts))


def _tensors(path: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
    tensors = load(path.read_bytes())
    params, residual = tensors.pop("params"), tensors.pop("residual", None)
    return params, {name.removeprefix("moments."): tensor for name, tensor in tensors.items()}, residual


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("[0-9]*") if path.is_dir()), key=lambda path: int(path.name))
