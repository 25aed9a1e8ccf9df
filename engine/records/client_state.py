"""Client state on disk: what a client keeps from round to round, one small safetensors file per client and round.

States are kept back to the oldest checkpoint, so that a client that is run again, and a run that is resumed, read the
same state as before. No process holds any: the page cache is the cache.
"""

from collections.abc import Iterable
from pathlib import Path

import ray
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.messages.errors import RunError
from engine.system.atomic import write_file
from strategies.core.protocol import ClientState

RANK = "shard-"  # each rank of a gang keeps its shards in a folder with its number
SHELVES = 256  # folders, so that no single one holds all clients
STRATEGY, OPTIMIZER = "strategy.", "optimizer."  # owners of entries; a transform's begin with transform0. and so on


def owned_by(state: ClientState, owner: str) -> ClientState:
    """Returns the entries of one owner, under its own names."""
    return {name.removeprefix(owner): tensor for name, tensor in state.items() if name.startswith(owner)}


def owned_as(state: ClientState, owner: str) -> ClientState:
    """Returns an owner's entries under the names that they have among all entries."""
    return {owner + name: tensor for name, tensor in state.items()}


class ClientStates:
    """Reads and writes client states under one folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, client: int, round_: int) -> ClientState:
        """Returns the client's newest state up to `round_`, empty if there is none; RunError if it cannot be read."""
        rounds = [number for number in self._rounds(client) if number <= round_]
        if not rounds:
            return {}
        path = self._path(client, max(rounds))
        try:
            return load(path.read_bytes())
        except SafetensorError as error:
            raise RunError(f"the client state {path} cannot be read ({error}): start again in another --out") from error

    def write(self, client: int, round_: int, state: ClientState, oldest: int) -> None:
        """Writes the state after `round_`, whole or not at all (OSError); removes states not read from `oldest` on."""
        path = self._path(client, round_)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({name: tensor.contiguous() for name, tensor in state.items()}))
        for number in sorted(number for number in self._rounds(client) if number <= oldest)[:-1]:
            self._path(client, number).unlink(missing_ok=True)

    def forget(self, client: int, round_: int) -> None:
        """Removes the client's state after `round_`, whose update was not counted."""
        self._path(client, round_).unlink(missing_ok=True)

    def _rounds(self, client: int) -> list[int]:
        return [int(path.stem) for path in self._path(client, 0).parent.glob("[0-9]*.safetensors")]

    def _path(self, client: int, round_: int) -> Path:
        return self.folder / f"{client % SHELVES:02x}" / str(client) / f"{round_:05d}.safetensors"


def forget_round(folder: Path, clients: Iterable[int], round_: int) -> None:
    """Removes the states that clients have written in a round whose sum they are not in."""
    for states in (ClientStates(folder), *map(ClientStates, sorted(folder.glob(f"{RANK}*")))):
        for client in clients:
            states.forget(int(client), round_)


def refuse_unseen(folder: Path) -> None:
    """Raises RunError if this process's node does not see the folder of client states."""
    if not folder.is_dir():
        raise RunError(
            f"clients keep state from round to round in {folder}, which is not seen on the node "
            f"{ray.util.get_node_ip_address()}: put --out on a disk that all nodes share"
        )
