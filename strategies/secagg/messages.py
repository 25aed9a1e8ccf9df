"""The messages of a session, as data. `nbytes` is what one takes on the wire of a real federation.

Fields that hold a share or a vector are left out of the printed form.
"""

from dataclasses import dataclass, field

import numpy as np

CLIENT_BYTES = 4  # a client's number


@dataclass(frozen=True)
class Keys:
    """Client to server, first trip: its public keys for this session, signed in the active profile."""

    client: int
    cipher_key: bytes
    mask_key: bytes
    signature: bytes = b""

    @property
    def nbytes(self) -> int:
        """The number and the keys."""
        return CLIENT_BYTES + len(self.cipher_key) + len(self.mask_key) + len(self.signature)


@dataclass(frozen=True)
class KeyList:
    """Server to every client: all keys in the order of the ring, and the k and t that the server means to use."""

    keys: tuple[Keys, ...]
    degree: int
    threshold: int

    @property
    def nbytes(self) -> int:
        """The keys and two numbers."""
        return sum(keys.nbytes for keys in self.keys) + 2 * CLIENT_BYTES


@dataclass(frozen=True)
class Shares:
    """Client to server, second trip: a commitment to its mask seed, and a sealed box for each neighbor."""

    client: int
    commitment: bytes
    boxes: dict[int, bytes] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Everything."""
        return CLIENT_BYTES + len(self.commitment) + boxes_bytes(self.boxes)


@dataclass(frozen=True)
class Inbox:
    """Server to a client: the boxes for it by sender; the senders are the neighbors that are left."""

    client: int
    boxes: dict[int, bytes] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The boxes and their senders."""
        return boxes_bytes(self.boxes)


@dataclass(frozen=True)
class MaskedSum:
    """Clients to server, third trip: the masked vector of one client, or the sum of those of a slot's clients.

    `vector_bytes` is one client's vector on the wire.
    """

    clients: tuple[int, ...]
    values: np.ndarray = field(repr=False)
    vector_bytes: int

    def plus(self, other: "MaskedSum") -> "MaskedSum":
        """The sum of both, which reuses this vector's memory."""
        values = self.values
        values += other.values
        return MaskedSum(self.clients + other.clients, values, self.vector_bytes)

    @property
    def nbytes(self) -> int:
        """The bytes of its clients' messages, each sent by itself."""
        return len(self.clients) * (CLIENT_BYTES + self.vector_bytes)


@dataclass(frozen=True)
class Survivors:
    """Server to clients: the clients whose masked input arrived. In the active profile they sign it."""

    clients: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The numbers."""
        return CLIENT_BYTES * len(self.clients)


@dataclass(frozen=True)
class Agreement:
    """Client to server, in the active profile: its signature under the survivors."""

    client: int
    signature: bytes

    @property
    def nbytes(self) -> int:
        """The number and the signature."""
        return CLIENT_BYTES + len(self.signature)


@dataclass(frozen=True)
class UnmaskRequest:
    """Server to a client: which of its neighbors (and itself) gave their masked input, and which dropped out."""

    client: int
    alive: tuple[int, ...]
    dead: tuple[int, ...]
    signatures: dict[int, bytes] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """The numbers and the signatures."""
        return CLIENT_BYTES * (len(self.alive) + len(self.dead)) + boxes_bytes(self.signatures)


@dataclass(frozen=True)
class Unmasking:
    """Client to server, last trip: shares of the living ones' mask seeds and of the dead ones' mask keys."""

    client: int
    seeds: dict[int, bytes] = field(repr=False)
    keys: dict[int, bytes] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The shares and their owners."""
        return CLIENT_BYTES + boxes_bytes(self.seeds) + boxes_bytes(self.keys)


def boxes_bytes(boxes: dict[int, bytes]) -> int:
    """Bytes by client, on the wire."""
    return sum(CLIENT_BYTES + len(box) for box in boxes.values())
