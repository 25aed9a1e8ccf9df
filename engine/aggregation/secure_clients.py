"""Secure aggregation in a slot: its clients' secrets, and the sum of their vectors, which leaves it masked alone.

Legend: L ring coordinates.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from hmac import digest
from typing import Any

import numpy as np
import ray
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.messages.tasks import Unit
from engine.messages.wire import Report
from strategies.secagg.client import Client
from strategies.secagg.masks import Masks, wrap
from strategies.secagg.messages import (
    Agreement,
    Inbox,
    KeyList,
    Keys,
    MaskedSum,
    Shares,
    Survivors,
    Unmasking,
    UnmaskRequest,
)
from strategies.secagg.protocol import Phase, Session
from strategies.secagg.ring import Sums


@dataclass(frozen=True)
class Opening:
    """A session of `cohort` begins, of which this slot has `packs`; `gone` drop out before they answer a phase."""

    session: Session
    cohort: tuple[int, ...]
    packs: tuple[Unit, ...]
    gone: Mapping[int, Phase]

    @property
    def clients(self) -> Unit:
        """The slot's clients."""
        return tuple(client for pack in self.packs for client in pack)


class Authority:
    """An actor that holds the secret behind all identities, as a registry outside of the session would.

    Slots ask it. The driver holds its handle and never its answers: those of a task of its own it would store itself.
    """

    def __init__(self) -> None:
        self._secret = os.urandom(32)

    def secret(self) -> bytes:
        """For slots alone, which play the clients."""
        return self._secret


class SecureClients:
    """The clients of one slot through the sessions of a round.

    Their vectors are made once a round and added up. When a session is void because another slot died, the next one
    masks the same sum with new keys: nothing of the first was revealed.
    """

    def __init__(self) -> None:
        self._opened: Opening | None = None
        self._members: dict[int, Client] = {}
        self._made: tuple[int, bytes] = (-1, b"")  # the round and the sums that the total is of
        self._tried: dict[int, Report] = {}
        self._added: set[int] = set()
        self._total_L = np.empty(0, np.uint32)

    def open(self, opening: Opening, authority: Any) -> list[Keys]:
        """First trip. In the active profile clients have identities, which `authority` (an actor) vouches for."""
        session, self._opened = opening.session, opening
        made = (session.round, session.sums.digest)
        if made != self._made:
            self._made, self._tried, self._added = made, {}, set()
            self._clear(session.sums)
        secret = ray.get(authority.secret.remote()) if session.parameters.active else b""
        known = _roster(secret, opening.cohort) if secret else {}
        private = {client: _identity(secret, client) if secret else b"" for client in opening.clients}
        self._members = {client: Client(session, client, private[client], known) for client in opening.clients}
        return [member.keys() for member in self._staying("keys").values()]

    def shares(self, listed: KeyList) -> list[Shares]:
        """Second trip."""
        return [member.shares(listed) for member in self._staying("shares").values()]

    def mask(
        self,
        inboxes: Mapping[int, Inbox],
        train: Callable[[Unit, Sums], Iterable[tuple[Report, np.ndarray | None]]],
    ) -> tuple[list[Report], MaskedSum]:
        """Third trip: the masked sum of the vectors (L,) that `train` gives for packs, each client's once a round."""
        assert self._opened is not None
        members = {client: m for client, m in self._staying("masked input").items() if client in inboxes}
        if not set(self._tried) <= set(members):  # who was added has dropped out since: no one is taken out of a sum
            self._tried, self._added = {}, set()
            self._clear(self._opened.session.sums)
        sums = self._opened.session.sums
        for pack in self._opened.packs:
            there = tuple(client for client in pack if client in members and client not in self._tried)
            for report, values_L in train(there, sums) if there else ():
                if values_L is not None:
                    self._total_L += values_L
                    self._added.add(report.client)
                self._tried[report.client] = report
        added = tuple(sorted(self._added))
        masked_L = self._masked([members[client].masks(inboxes[client]) for client in added], sums.bits)
        return list(self._tried.values()), MaskedSum(added, masked_L, sums.nbytes)

    def _clear(self, sums: Sums) -> None:
        """Nobody has been added yet."""
        self._total_L = np.zeros(sums.length, np.uint32)

    def _masked(self, masks: list[Masks], bits: int) -> np.ndarray:
        """The sum (L,) under all these masks; what of it ranks hold stays with them."""
        masked_L = self._total_L.copy()
        wrap(masked_L, bits)
        for mask in masks:
            mask.apply(masked_L)
        return masked_L

    def agree(self, survivors: Survivors) -> list[Agreement]:
        """The active profile's trip."""
        alive = set(survivors.clients)
        return [member.agree(survivors) for client, member in self._staying("agreement").items() if client in alive]

    def unmask(self, requests: Mapping[int, UnmaskRequest]) -> list[Unmasking]:
        """Last trip."""
        return [m.unmask(requests[client]) for client, m in self._staying("unmask").items() if client in requests]

    def roster(self, cohort: tuple[int, ...], authority: Any) -> dict[int, bytes]:
        """The cohort's public identity keys, for the server."""
        return _roster(ray.get(authority.secret.remote()), cohort)

    def _staying(self, phase: Phase) -> dict[int, Client]:
        """Those who answer; who does not is forgotten, with its secrets."""
        assert self._opened is not None
        gone = self._opened.gone
        self._members = {client: member for client, member in self._members.items() if gone.get(client) != phase}
        return self._members


def _roster(secret: bytes, clients: Iterable[int]) -> dict[int, bytes]:
    """Everybody's public identity key (Ed25519)."""
    private = {client: Ed25519PrivateKey.from_private_bytes(_identity(secret, client)) for client in clients}
    return {client: key.public_key().public_bytes_raw() for client, key in private.items()}


def _identity(secret: bytes, client: int) -> bytes:
    """A client's private identity key: made from the run's secret, so that every slot that plays the client has it."""
    return digest(secret, b"fedpost identity" + client.to_bytes(8, "big"), sha256)
