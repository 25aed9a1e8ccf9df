"""What clients remember from round to round, on disk: one small safetensors file per client and round.

A memory becomes current with its round and is kept back to the oldest checkpoint, so that a client that is run again,
and a run that is resumed, reads what was read before. Nothing is held in a process: the page cache is the cache.
With several nodes the folder must lie where all of them see it.
"""

import os
from pathlib import Path

import ray
from safetensors import SafetensorError
from safetensors.torch import load, save

from strategies.core.protocol import ClientState

RANK = "shard-"  # what a gang's rank remembers of its shards lies in a folder with its number
SHELVES = 256  # folders, so that no single one holds all clients


STRATEGY, OPTIMIZER = "strategy.", "optimizer."  # whose an entry is; a transform's begin with transform0. and so on


def part(memory: ClientState, owner: str) -> ClientState:
    """What belongs to one owner, under its own names."""
    return {name.removeprefix(owner): tensor for name, tensor in memory.items() if name.startswith(owner)}


def named(memory: ClientState, owner: str) -> ClientState:
    """An owner's entries as they lie among others'."""
    return {owner + name: tensor for name, tensor in memory.items()}


class ClientMemory:
    """Reads and writes memories under one folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, client: int, round_: int) -> ClientState:
        """The client's newest memory up to `round_`; empty if it has none. ValueError if it cannot be read."""
        found = [number for number in self._rounds(client) if number <= round_]
        if not found:
            return {}
        path = self._path(client, max(found))
        try:
            return load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(
                f"the memory {path} cannot be read ({error}): start the run anew in another --out"
            ) from error

    def write(self, client: int, round_: int, memory: ClientState, oldest: int) -> None:
        """Writes what the client knows after `round_`, whole or not at all (OSError).

        What no round from `oldest` on can ask for is forgotten.
        """
        path = self._path(client, round_)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                file.write(save({name: tensor.contiguous() for name, tensor in memory.items()}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        needed = [number for number in self._rounds(client) if number <= oldest]
        for number in sorted(needed)[:-1]:
            self._path(client, number).unlink(missing_ok=True)

    def forget(self, client: int, round_: int) -> None:
        """Removes what the client knew after `round_`, which came to nothing."""
        self._path(client, round_).unlink(missing_ok=True)

    def _rounds(self, client: int) -> list[int]:
        return [int(path.stem) for path in self._path(client, 0).parent.glob("[0-9]*.safetensors")]

    def _path(self, client: int, round_: int) -> Path:
        return self.folder / f"{client % SHELVES:02x}" / str(client) / f"{round_:05d}.safetensors"


def every_memory(folder: Path) -> list[ClientMemory]:
    """The memory of plain slots, and those of the ranks of gangs."""
    return [ClientMemory(folder), *map(ClientMemory, sorted(folder.glob(f"{RANK}*")))]


def refuse_unseen(folder: Path) -> None:
    """Raises ValueError if this process's node does not see the folder where clients remember."""
    if not folder.is_dir():
        raise ValueError(
            f"clients remember from round to round in {folder}, which is not seen on the node "
            f"{ray.util.get_node_ip_address()}: put --out on a disk that all nodes share"
        )
