"""A run's state on disk: safetensors and JSON, never pickle; a checkpoint is there whole or not at all.

Its facts hold the digest of each other file, so that what a disk has changed is found.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.messages.shards import Shard, ShardedState, borrow, borrow_all
from engine.system.atomic import write_folder
from strategies.core.protocol import ServerState

STATE, SHARD, FACTS = "state.safetensors", "shard-{:05d}.safetensors", "facts.json"
State = ServerState | ShardedState


@dataclass(frozen=True)
class Saved:
    """What a resumed run starts from: the strategy's state, the seconds that the run had taken, and what privacy needs.

    `clip` is the next round's clipping norm, `aborts` how many rounds of secure aggregation had no result. Packs have
    so many `lanes`; `costs` is what is known of how long clients take. `passed_over` says of newer checkpoints why they
    could not be read. `last_sum` is the last round whose sum is in the state, which names its model.
    """

    state: State
    wall_s: float
    clip: float = 0.0
    aborts: int = 0
    lanes: int = 1
    costs: list[float] = field(default_factory=list)
    passed_over: tuple[str, ...] = ()
    last_sum: int = 0


def save_checkpoint(folder: Path, saved: Saved, keep: int) -> None:
    """Writes `folder/NNNNN` for the state's round and removes all but the last `keep` up to it."""
    for scratch in folder.glob(".[0-9]*"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed while it wrote
    round_ = saved.state.round
    facts = {name: value for name, value in vars(saved).items() if name not in ("state", "passed_over")}
    write_folder(folder / f"{round_:05d}", _files(saved.state, facts | {"round": round_}))
    found = _checkpoints(folder)
    reached = [path for path in found if int(path.name) <= round_]
    for path in (*reached[:-keep], *found[len(reached) :]):  # a resumed run has passed over those after it
        shutil.rmtree(path)


def load_checkpoint(folder: Path, last: int | None = None) -> Saved | None:
    """The newest checkpoint of `folder` (up to round `last`) that can be read, None without any checkpoint.

    ValueError when there are some, and none can be read.
    """
    found = [path for path in _checkpoints(folder) if last is None or int(path.name) <= last]
    passed_over: tuple[str, ...] = ()
    for path in reversed(found):
        try:
            return _load(path, passed_over)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            passed_over += (f"the checkpoint {path} cannot be read ({error})",)
    if not passed_over:
        return None
    raise ValueError(
        f"{passed_over[0]}{', nor can one before' if len(found) > 1 else ''}: start the run anew in another --out"
    )


def _load(folder: Path, passed_over: tuple[str, ...]) -> Saved:
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts["digest"] != _digest(facts):
        raise ValueError(f"{FACTS} is not as it was written")
    state = _read(folder, int(facts["round"]), {str(name): str(digest) for name, digest in facts["files"].items()})
    figures = float(facts["wall_s"]), float(facts["clip"]), int(facts["aborts"]), int(facts["lanes"])
    last_sum = int(facts.get("last_sum", state.round))  # of earlier versions' checkpoints, which had no journal
    return Saved(state, *figures, [float(cost) for cost in facts["costs"]], passed_over, last_sum)


def _files(state: State, facts: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint one after another, the facts at the end."""
    digests = {}
    for name, content in _tensor_files(state):
        digests[name] = sha256(content).hexdigest()
        yield name, content
    facts |= {"files": digests}
    yield FACTS, json.dumps(facts | {"digest": _digest(facts)}).encode()


def _digest(facts: dict[str, Any]) -> str:
    """Of all other facts."""
    rest = {name: value for name, value in facts.items() if name != "digest"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tensor_files(state: State) -> Iterator[tuple[str, bytes]]:
    """Of a state in shards, one shard at a time is in this process."""
    if isinstance(state, ServerState):
        residual = {} if state.residual is None else {"residual": state.residual}
        yield STATE, save({"params": state.params} | _named(state.moments) | residual)
        return
    for rank, part in enumerate(state.parts):
        shard: Shard = ray.get(part)
        yield SHARD.format(rank), save({"params": borrow(shard.params)} | _named(borrow_all(shard.vectors)))


def _named(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"moments.{name}": moment for name, moment in moments.items()}


def _read(folder: Path, round_: int, digests: dict[str, str]) -> State:
    if digests.keys() == {STATE}:
        params, moments, residual = _tensors(folder / STATE, digests[STATE])
        return ServerState(round_, params, moments, residual)
    if not digests or digests.keys() != {SHARD.format(rank) for rank in range(len(digests))}:
        raise ValueError(f"it lists no state: {', '.join(digests) or 'nothing'}")
    parts, nbytes = [], 0
    for name in sorted(digests):
        params, moments, _ = _tensors(folder / name, digests[name])
        shard = Shard.of(params, moments)
        parts.append(ray.put(shard))
        nbytes += shard.nbytes
    return ShardedState(round_, tuple(parts), nbytes)


def _tensors(path: Path, digest: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
    content = path.read_bytes()
    if sha256(content).hexdigest() != digest:
        raise ValueError(f"{path.name} is not as it was written")
    tensors = load(content)
    params, residual = tensors.pop("params"), tensors.pop("residual", None)
    return params, {name.removeprefix("moments."): tensor for name, tensor in tensors.items()}, residual


def _checkpoints(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("[0-9]*") if path.is_dir() and path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))
