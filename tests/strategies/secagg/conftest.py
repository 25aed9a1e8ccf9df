"""A session as the engine plays it, less Ray: everybody's messages, in any order, with drop-outs in any trip."""

import os
import random
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from strategies.secagg.client import Client
from strategies.secagg.messages import MaskedSum
from strategies.secagg.parameters import Parameters
from strategies.secagg.protocol import SecAggAbort, Session
from strategies.secagg.ring import Sum, Sums
from strategies.secagg.server import SecAggServer


def restored(client):
    """A copy of a client, which is to be asked again."""
    copy = Client(client.session, client._client, client._state.identity, client._state.roster)
    copy._state, copy._phase = deepcopy(client._state), client._phase
    return copy


def masked_by(client, inbox, values):
    """A client's ring vector (L,), masked in place, as its message."""
    client.masks(inbox).apply(values)
    return MaskedSum((inbox.client,), values, client.session.sums.nbytes)


def encoded_by(sums, values, weight, rng):
    """A client's ring vector (L,) of all sums."""
    parts = [sums.encode_piece(entry.name, values[entry.name], weight, rng) for entry in sums.sums]
    return np.concatenate([sums.encode_head(weight), *parts])


@dataclass
class Play:
    """A session under way: `clients` by number, the server, and all messages that were sent."""

    session: Session
    seed: int = 0
    ids: tuple[int, ...] = ()
    messages: list = field(default_factory=list)

    def __post_init__(self):
        self.ids = self.ids or tuple(range(self.session.parameters.clients))
        self.random = random.Random(self.seed)
        private = {u: os.urandom(32) for u in self.ids} if self.session.parameters.active else {}
        self.roster = {
            u: Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw() for u, key in private.items()
        }
        self.clients = {u: Client(self.session, u, private.get(u, b""), self.roster) for u in self.ids}
        self.server = SecAggServer(self.session, self.ids, roster=self.roster)

    def shuffled(self, messages):
        messages = list(messages)
        self.random.shuffle(messages)
        self.messages += messages
        return messages

    def to_keys(self, gone=()):
        self.listed = self.server.key_list(self.shuffled(self.clients[u].keys() for u in self.ids if u not in gone))
        self.messages.append(self.listed)
        return self.listed

    def to_shares(self, gone=()):
        listed = [keys.client for keys in self.listed.keys]
        self.inboxes = self.server.inboxes(
            self.shuffled(self.clients[u].shares(self.listed) for u in listed if u not in gone)
        )
        self.messages += self.inboxes.values()
        return self.inboxes

    def to_masked(self, vectors, gone=()):
        present = [u for u in self.inboxes if u not in gone]
        for masked in self.shuffled(masked_by(self.clients[u], self.inboxes[u], vectors[u].copy()) for u in present):
            self.server.add(masked)
        self.survivors = self.server.survivors()
        return self.survivors

    def to_requests(self, gone=()):
        if not self.session.parameters.active:
            self.asked = self.server.requests()
        else:
            agreed = [self.clients[u].agree(self.survivors) for u in self.survivors.clients if u not in gone]
            self.asked = self.server.requests(self.shuffled(agreed))
        self.messages += self.asked.values()
        return self.asked

    def to_total(self, gone=()):
        answers = (self.clients[u].unmask(request) for u, request in self.asked.items() if u not in gone)
        self.server.unmask(self.shuffled(answers))
        return self.server.total()

    def through(self, vectors, gone=((), (), (), ())):
        self.to_keys(gone[0])
        self.to_shares(gone[1])
        self.to_masked(vectors, gone[2])
        self.to_requests()
        return self.to_total(gone[3])


@pytest.fixture(scope="session")
def start():
    """Begins a session of n clients: `start(n, k, t)`, with options."""

    def make(n, k=None, t=2, length=9, bits=32, mode="full", active=False, round=0, attempt=0, **options):
        parameters = Parameters(n, n - 1 if k is None else k, t, active)
        sums = Sums((Sum("delta", length, 1.0),), n, bits)
        return Play(Session(round, attempt, parameters, sums, mode), **options)

    return make


@pytest.fixture(scope="session")
def drawn():
    """Random ring vectors by client: `drawn(play)`; the first coordinate is 1 as it must be."""

    def make(play, seed=0):
        rng = np.random.default_rng(seed)
        sums = play.session.sums
        vectors = {}
        for u in play.ids:
            vectors[u] = rng.integers(0, 2**sums.bits, sums.length, np.uint64).astype(np.uint32)
            vectors[u][0] = 1
        return vectors

    return make


@pytest.fixture(scope="session")
def ring_sum():
    """The plain sum of some clients' vectors modulo 2^b."""

    def add(vectors, clients, bits=32):
        total = sum(vectors[u].astype(np.uint64) for u in clients)
        return (total % 2**bits).astype(np.uint32)

    return add


@pytest.fixture
def play(start):
    """Six clients, any four of whom recover a secret; nothing has been sent."""
    return start(6, t=4)


@pytest.fixture(scope="session")
def refused():
    """Checks that an act aborts so, and that clients then answer nothing more and have forgotten everything."""

    def check(phase, reason, act, *clients):
        with pytest.raises(SecAggAbort, match=reason) as caught:
            act()
        assert caught.value.phase == phase
        for client in clients:
            assert repr(client) == f"Client({client._client}, phase='aborted')"
            assert not any(vars(client._state).values())

    return check
