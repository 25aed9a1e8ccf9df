"""The clients' side of secure aggregation in a slot: keys, shares and masks. Their vectors are in a RingSum."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from hmac import digest
from typing import Any, NamedTuple

import numpy as np
import ray
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.messages.reports import DOWN, Report
from engine.messages.tasks import Unit
from strategies.secagg import messages
from strategies.secagg.client import Client
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Phase, Session


class Opening(NamedTuple):
    """A session of `cohort` begins, of which this slot has `units`; `gone` drop out before they answer a phase."""

    session: Session
    cohort: tuple[int, ...]
    units: tuple[Unit, ...]
    gone: Mapping[int, Phase]


class Authority:
    """An actor that holds the secret behind all identities, as a registry outside of the session would.

    Slots ask it. The driver never does: the answer would lie in its own object store.
    """

    def __init__(self) -> None:
        self._secret = os.urandom(32)

    def secret(self) -> bytes:
        """For slots alone, which play the clients."""
        return self._secret


class SecureWork(NamedTuple):
    """What a worker still has to train before it masks its sum; with `fresh` its ring sum begins at zero."""

    session: Session
    units: tuple[Unit, ...]
    fresh: bool


class SecureClients:
    """The clients of one slot through the sessions of a round: their keys and shares, and whom the slot's sum holds.

    A round's vectors are made and added up once. When a session is void because another slot died, the next one
    masks the same sum with new keys: nothing of the first was revealed.
    """

    def __init__(self) -> None:
        self._opened: Opening | None = None
        self._members: dict[int, Client] = {}
        self._summed: tuple[int, bytes] = (-1, b"")  # the round and the sums that the ring sum is of
        self._reports: dict[int, Report] = {}  # of clients that were trained for it, or could not be

    def open(self, opening: Opening, authority: Any) -> list[messages.Keys]:
        """First trip. In the active profile clients have identities, which `authority` (an actor) vouches for."""
        session, self._opened = opening.session, opening
        summed = (session.round, session.sums.digest)
        if summed != self._summed:
            self._summed, self._reports = summed, {}
        clients = [client for unit in opening.units for client in unit]
        secret = ray.get(authority.secret.remote()) if session.parameters.active else b""
        known = _roster(secret, opening.cohort) if secret else {}
        private = {client: _identity(secret, client) if secret else b"" for client in clients}
        self._members = {client: Client(session, client, private[client], known) for client in clients}
        return [member.keys() for member in self._staying("keys").values()]

    def shares(self, listed: messages.KeyList) -> list[messages.Shares]:
        """Second trip."""
        return [member.shares(listed) for member in self._staying("shares").values()]

    def pending(self, inboxes: Mapping[int, messages.Inbox]) -> SecureWork:
        """Third trip, first part: returns the clients that still have to train, each once a round."""
        assert self._opened is not None
        staying = self._staying("masked input")
        self._members = {client: member for client, member in staying.items() if client in inboxes}
        if not set(self._reports) <= set(self._members):
            self._reports = {}  # a client in the sum has dropped out since, and nobody can be taken out of a sum
        left = [[c for c in unit if c in self._members and c not in self._reports] for unit in self._opened.units]
        return SecureWork(self._opened.session, tuple(tuple(unit) for unit in left if unit), not self._reports)

    def masks(self, reports: Iterable[Report], inboxes: Mapping[int, messages.Inbox]) -> list[Masks]:
        """Third trip, second part: takes the pending clients' reports; returns the masks of all clients in the sum."""
        self._reports |= {report.client: report for report in reports}
        return [self._members[client].masks(inboxes[client]) for client in self._added()]

    def answer(self, masked: np.ndarray) -> tuple[list[Report], messages.MaskedSum]:
        """Third trip, last part: returns all reports, without figures and errors, and the masked sum."""
        assert self._opened is not None
        reports = [replace(report, metrics={DOWN: report.metrics[DOWN]}, tried=()) for report in self._reports.values()]
        return reports, messages.MaskedSum(self._added(), masked, self._opened.session.sums.nbytes)

    def _added(self) -> tuple[int, ...]:
        return tuple(sorted(client for client, report in self._reports.items() if report.good))

    def agree(self, survivors: messages.Survivors) -> list[messages.Agreement]:
        """The active profile's trip."""
        alive = set(survivors.clients)
        return [member.agree(survivors) for client, member in self._staying("agreement").items() if client in alive]

    def unmask(self, requests: Mapping[int, messages.UnmaskRequest]) -> list[messages.Unmasking]:
        """Last trip."""
        return [m.unmask(requests[client]) for client, m in self._staying("unmask").items() if client in requests]

    def roster(self, cohort: tuple[int, ...], authority: Any) -> dict[int, bytes]:
        """The cohort's public identity keys, for the server."""
        return _roster(ray.get(authority.secret.remote()), cohort)

    def _staying(self, phase: Phase) -> dict[int, Client]:
        """Returns the clients that answer this phase; forgets the others and their secrets."""
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
