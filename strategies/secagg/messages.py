"""The messages of a session, as data. Fields that hold a share or a vector are left out of the printed form."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np

NUMBER_BYTES = 4  # a client's number, k or t


@dataclass(frozen=True)
class Message:
    """A message; `nbytes` is what it takes on the wire of a real federation."""

    addressed: ClassVar[bool] = False  # `client` is where it goes, and does not travel itself

    @property
    def nbytes(self) -> int:
        """The bytes of all fields."""
        names = (entry.name for entry in fields(self) if not (self.addressed and entry.name == "client"))
        return sum(_bytes(getattr(self, name)) for name in names)


@dataclass(frozen=True)
class Keys(Message):
    """Client to server, first trip: its public keys for this session, signed in the active profile."""

    client: int
    cipher_key: bytes
    mask_key: bytes
    signature: bytes = b""


@dataclass(frozen=True)
class KeyList(Message):
    """Server to every client: all keys in the order of the ring, and the k and t that the server means to use."""

    keys: tuple[Keys, ...]
    degree: int
    threshold: int


@dataclass(frozen=True)
class Shares(Message):
    """Client to server, second trip: a commitment to its mask seed, and a sealed box for each neighbor."""

    client: int
    commitment: bytes
    boxes: dict[int, bytes] = field(repr=False)


@dataclass(frozen=True)
class Inbox(Message):
    """Server to a client: the boxes for it by sender; the senders are the neighbors that are left."""

    addressed: ClassVar[bool] = True
    client: int
    boxes: dict[int, bytes] = field(repr=False)


@dataclass(frozen=True)
class MaskedSum(Message):
    """Clients to server, third trip: the masked vector of one client, or the sum of those of a slot's clients.

    `vector_bytes` is one client's vector on the wire; each client's message counts by itself.
    """

    clients: tuple[int, ...]
    values: np.ndarray = field(repr=False)
    vector_bytes: int

    @property
    def nbytes(self) -> int:
        """The bytes of its clients' messages."""
        return len(self.clients) * (NUMBER_BYTES + self.vector_bytes)


@dataclass(frozen=True)
class Survivors(Message):
    """Server to clients: the clients whose masked input arrived. In the active profile they sign it."""

    clients: tuple[int, ...]


@dataclass(frozen=True)
class Agreement(Message):
    """Client to server, in the active profile: its signature under the survivors."""

    client: int
    signature: bytes


@dataclass(frozen=True)
class UnmaskRequest(Message):
    """Server to a client: which of its neighbors (and itself) gave their masked input, and which dropped out."""

    addressed: ClassVar[bool] = True
    client: int
    alive: tuple[int, ...]
    dead: tuple[int, ...]
    signatures: dict[int, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Unmasking(Message):
    """Client to server, last trip: shares of the living ones' mask seeds and of the dead ones' mask keys."""

    client: int
    seeds: dict[int, bytes] = field(repr=False)
    keys: dict[int, bytes] = field(repr=False)


def _bytes(value: object) -> int:
    match value:
        case bytes():
            return len(value)
        case tuple():
            return sum(map(_bytes, value))
        case dict():
            return sum(map(_bytes, (*value, *value.values())))
        case Message():
            return value.nbytes
    return NUMBER_BYTES
