"""What all parties of a session know beforehand, its identity, and its early end.

SecAgg+ (Bell et al. 2020, CCS, algorithms 2 and 3) on the complete graph is SecAgg (Bonawitz et al. 2017, CCS, figure
4). The trips, as `client.py` and `server.py` play them: keys, shares, masked input, agreement (active profile), unmask.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from strategies.secagg.messages import KeyList, Keys
from strategies.secagg.parameters import Parameters
from strategies.secagg.primitives import PRIMITIVES, Mode, Tampered
from strategies.secagg.ring import Sums

Phase = Literal["keys", "shares", "masked input", "agreement", "unmask"]


class SecAggAbort(Exception):
    """A session ended without a result: in which phase and why. The reason names clients by number, never a secret."""

    def __init__(self, phase: Phase, reason: str) -> None:
        super().__init__(phase, reason)
        self.phase = phase
        self.reason = reason

    def __str__(self) -> str:
        return f"secure aggregation was aborted in the phase {self.phase!r}: {self.reason}"


@dataclass(frozen=True)
class Session:
    """Session `attempt` of a round: everybody knows it from the recipe, and nobody accepts another from the server."""

    round: int
    attempt: int
    parameters: Parameters
    sums: Sums
    mode: Mode = "full"

    def __post_init__(self) -> None:
        ring, invited = self.sums.clients, self.parameters.clients
        if ring != invited:
            raise ValueError(f"the ring is made for {ring} clients, and {invited} are invited")

    @property
    def facts(self) -> bytes:
        """All fields as bytes."""
        p = self.parameters
        numbers = f"{self.round}/{self.attempt}/{p.clients}/{p.degree}/{p.threshold}/{p.active}/{self.mode}"
        return f"fedpost secagg 1{numbers}".encode() + self.sums.digest

    def identity(self, listed: KeyList) -> bytes:
        """The session's id: a hash of the facts, everybody's keys, and the order of clients on the ring."""
        keys = sorted(_number(key.client) + key.cipher_key + key.mask_key for key in listed.keys)
        order = numbers(key.client for key in listed.keys)
        return sha256(self.facts + _number(len(keys)) + order + b"".join(keys)).digest()

    def mask_purpose(self, kind: Literal["pair", "self"]) -> bytes:
        """The purpose of a mask's key, which makes it independent of the keys for other vectors."""
        return f"fedpost secagg mask/{kind}/sums/{self.sums.length}/{self.sums.bits}".encode()

    def signed_keys(self, keys: Keys) -> bytes:
        """The text that a client signs when it offers its keys."""
        facts = sha256(self.facts).digest()
        return b"fedpost secagg keys" + facts + _number(keys.client) + keys.cipher_key + keys.mask_key

    def enough(self, left: int, phase: Phase, whose: str) -> None:
        """Aborts unless the shares of the `left` holders recover a secret."""
        t = self.parameters.threshold
        abort_unless(left >= t, phase, f"{left} clients are left to recover {whose}, and it takes {t}")


class Party(ABC):
    """A state machine of one session; any error in a phase makes it forget everything and answer nothing more."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._primitives = PRIMITIVES[session.mode]
        self._phase = ""

    @abstractmethod
    def _forget(self) -> None: ...

    @contextmanager
    def _turn(self, phase: Phase, after: str, reached: str | None = None) -> Iterator[None]:
        """Runs one phase, once, after the phase `after`."""
        try:
            abort_unless(self._phase == after, phase, f"out of turn, after {self._phase!r} in place of {after!r}")
            yield
            self._phase = reached or phase
        except Exception as error:
            self._phase = "aborted"
            self._forget()
            if isinstance(error, Tampered):
                raise SecAggAbort(phase, str(error)) from None
            raise


def abort_unless(condition: bool, phase: Phase, reason: str) -> None:
    """Raises SecAggAbort unless the condition holds."""
    if not condition:
        raise SecAggAbort(phase, reason)


def box_context(sid: bytes, sender: int, recipient: int) -> bytes:
    """The context that a box of shares is bound to."""
    return sid + _number(sender) + _number(recipient)


def signed_survivors(sid: bytes, clients: Iterable[int]) -> bytes:
    """The text that clients sign when they agree on the survivors."""
    return b"fedpost secagg survivors" + sid + numbers(sorted(clients))


def numbers(clients: Iterable[int]) -> bytes:
    """Clients as bytes."""
    return b"".join(map(_number, clients))


def once(clients: Sequence[int], phase: Phase) -> set[int]:
    """The clients as a set; aborts if one is named twice."""
    distinct = set(clients)
    abort_unless(len(distinct) == len(clients), phase, "a client is named twice")
    return distinct


def _number(client: int) -> bytes:
    return client.to_bytes(8, "big")
