"""Checkpoints: a run's state on disk as safetensors and JSON, never pickle; each is there whole or not at all.

Each shard of the model state is a file. The facts hold the digest of each other file, so that changes are noticed.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.messages.errors import RunError
from engine.messages.shards import ShardedState
from engine.system.atomic import write_folder
from strategies.core.protocol import ServerState

STATE, SHARD, FACTS = "state.safetensors", "shard-{:05d}.safetensors", "facts.json"
MOMENT = "moments."
Read = Callable[[Any], ServerState]  # gives a shard's tensors, wherever the state holds them
Hold = Callable[[ServerState], Any]  # puts a shard where the state is to hold it


@dataclass(frozen=True)
class Saved:
    """What a resumed run starts from: the model state, the seconds that the run had taken, and what privacy needs.

    `clip` is the next round's clipping norm, `aborts` how many rounds of secure aggregation had no result. Up to
    `lanes` clients train together in a slot; `costs` is what is known of how long clients take. `passed_over` says why
    newer checkpoints could not be read. `last_sum` is the last round whose sum is in the state, which names its model.
    """

    state: ShardedState
    wall_s: float
    clip: float = 0.0
    aborts: int = 0
    lanes: int = 1
    costs: list[float] = field(default_factory=list)
    passed_over: tuple[str, ...] = ()
    last_sum: int = 0


def save_checkpoint(folder: Path, saved: Saved, keep: int, read: Read = lambda shard: shard) -> None:
    """Writes `folder/NNNNN` for the state's round, one shard in memory at a time; removes all but the last `keep`."""
    for scratch in filter(Path.is_dir, folder.glob(".[0-9]*")):  # of processes that were killed while they wrote
        shutil.rmtree(scratch, ignore_errors=True)
    round_ = saved.state.round
    facts = {name: value for name, value in vars(saved).items() if name not in ("state", "passed_over")}
    write_folder(folder / f"{round_:05d}", _files(saved.state.shards, facts | {"round": round_}, read))
    checkpoints = _checkpoints(folder)
    reached = [path for path in checkpoints if int(path.name) <= round_]
    for path in (*reached[:-keep], *checkpoints[len(reached) :]):  # a resumed run has passed over those after it
        shutil.rmtree(path)


def load_checkpoint(folder: Path, last: int | None = None, hold: Hold = lambda shard: shard) -> Saved | None:
    """Returns the newest readable checkpoint up to round `last`, None without any; RunError if none can be read."""
    checkpoints = [path for path in _checkpoints(folder) if last is None or int(path.name) <= last]
    passed_over: tuple[str, ...] = ()
    for path in reversed(checkpoints):
        try:
            return _load(path, passed_over, hold)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            passed_over += (f"the checkpoint {path} cannot be read ({error})",)
    if not passed_over:
        return None
    others = ", nor can one before" if len(checkpoints) > 1 else ""
    raise RunError(f"{passed_over[0]}{others}: start again in another --out")


def _load(folder: Path, passed_over: tuple[str, ...], hold: Hold) -> Saved:
    facts = dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    if facts.pop("digest") != _digest(facts):
        raise ValueError(f"{FACTS} is not as it was written")
    round_, digests = int(facts["round"]), dict(facts["files"])
    if not digests or digests.keys() not in ({STATE}, {SHARD.format(rank) for rank in range(len(digests))}):
        raise ValueError(f"it lists no state: {', '.join(digests) or 'nothing'}")
    shards, nbytes = [], 0
    for name in sorted(digests):
        shard, size = _shard(folder / name, digests[name], round_)
        shards.append(hold(shard))
        nbytes += size
    figures = float(facts["wall_s"]), float(facts["clip"]), int(facts["aborts"]), int(facts["lanes"])
    last_sum = int(facts.get("last_sum", round_))  # earlier versions' checkpoints do not have it
    costs = [float(cost) for cost in facts["costs"]]
    return Saved(ShardedState(round_, tuple(shards), nbytes), *figures, costs, passed_over, last_sum)


def _files(shards: tuple[Any, ...], facts: dict[str, Any], read: Read) -> Iterator[tuple[str, bytes]]:
    """Yields the files of a checkpoint one after another, the facts last."""
    digests = {}
    for rank, shard in enumerate(shards):
        name, content = STATE if len(shards) == 1 else SHARD.format(rank), _content(read(shard))
        digests[name] = sha256(content).hexdigest()
        yield name, content
    facts |= {"files": digests}
    yield FACTS, json.dumps(facts | {"digest": _digest(facts)}).encode()


def _digest(facts: dict[str, Any]) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _content(shard: ServerState) -> bytes:
    merged = {} if shard.merged_delta is None else {"merged_delta": shard.merged_delta}
    return save({"params": shard.params, **{MOMENT + name: value for name, value in shard.moments.items()}, **merged})


def _shard(path: Path, digest: str, round_: int) -> tuple[ServerState, int]:
    """Reads a shard and its size in bytes; ValueError if the file has changed."""
    content = path.read_bytes()
    if sha256(content).hexdigest() != digest:
        raise ValueError(f"{path.name} is not as it was written")
    tensors = load(content)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    params, merged_delta = tensors.pop("params"), tensors.pop("merged_delta", None)
    moments = {name.removeprefix(MOMENT): tensor for name, tensor in tensors.items()}
    return ServerState(round_, params, moments, merged_delta), nbytes


def _checkpoints(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("[0-9]*") if path.is_dir() and path.name.isdecimal())
    return sorted(paths, key=lambda path: int(path.name))
