"""A client of secure aggregation: a state machine that gives each message once and forgets its secrets early.

Bell et al. 2020, algorithm 3; Bonawitz et al. 2017, figure 4, for the active profile. Any message that is out of turn
or malformed aborts the session for this client: it forgets everything and answers nothing more.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NoReturn

from strategies.secagg.masks import Masks
from strategies.secagg.messages import (
    Agreement,
    Inbox,
    KeyList,
    Keys,
    Shares,
    Survivors,
    Unmasking,
    UnmaskRequest,
)
from strategies.secagg.parameters import neighbors
from strategies.secagg.primitives import KEY_BYTES, Tampered
from strategies.secagg.protocol import BOX, Phase, SecAggAbort, Session, box_context, once, signed_survivors
from strategies.secagg.shamir import SHARE_BYTES


@dataclass(repr=False)
class Secrets:
    """What a client keeps between messages: numbers, text and bytes only. It is never printed.

    `phase` is the last one that it completed. `shares` is by author: a share of the mask seed, then of the private mask
    key. `box_keys` and `pair_keys` have one key for each neighbor; the private keys that they come from are erased
    before.
    """

    client: int
    phase: str = ""
    identity: bytes = b""
    roster: dict[int, bytes] = field(default_factory=dict)
    cipher_key: bytes = b""
    mask_key: bytes = b""
    offered: bytes = b""
    sid: bytes = b""
    seed: bytes = b""
    box_keys: dict[int, bytes] = field(default_factory=dict)
    pair_keys: dict[int, bytes] = field(default_factory=dict)
    shares: dict[int, bytes] = field(default_factory=dict)
    present: tuple[int, ...] = ()
    agreed: tuple[int, ...] = ()


class Client:
    """Plays one session. In the active profile `identity` is its private Ed25519 key, `roster` everybody's public one.

    Both come from outside the session, since the server could lie about them.
    """

    def __init__(
        self, session: Session, client: int, identity: bytes = b"", roster: Mapping[int, bytes] | None = None
    ) -> None:
        if session.parameters.active and not (identity and roster):
            raise ValueError("the active profile needs the client's identity key and everybody's public ones")
        self.session = session
        self._primitives = session.primitives
        self._state = Secrets(client, identity=identity, roster=dict(roster or {}))

    def __repr__(self) -> str:
        return f"Client({self._state.client}, phase={self._state.phase!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client's secrets stay where they are; they do not travel")

    def keys(self) -> Keys:
        """First trip: fresh keys, one to encrypt shares, one to agree on masks."""
        state = self._state
        with self._turn("keys", after=""):
            state.cipher_key, state.mask_key = self._primitives.private_key(), self._primitives.private_key()
            public = [self._primitives.public_key(key) for key in (state.cipher_key, state.mask_key)]
            keys = Keys(state.client, public[0], public[1])
            state.offered = keys.cipher_key + keys.mask_key
            if not self.session.parameters.active:
                return keys
            return replace(keys, signature=self._primitives.sign(state.identity, self.session.signed_keys(keys)))

    def shares(self, listed: KeyList) -> Shares:
        """Second trip: checks the keys, draws the mask seed and shares it and the private mask key."""
        state, primitives, parameters = self._state, self._primitives, self.session.parameters
        with self._turn("shares", after="keys"):
            self._check(listed)
            state.sid = self.session.identity(listed)
            order = [keys.client for keys in listed.keys]
            around = neighbors(order, order.index(state.client), parameters)
            public = {keys.client: keys for keys in listed.keys}
            try:
                cipher_keys = {v: public[v].cipher_key for v in around}
                state.box_keys = primitives.agree(state.cipher_key, cipher_keys, state.sid, BOX)
                mask_keys = {v: public[v].mask_key for v in around}
                purpose = self.session.mask_purpose("pair")
                state.pair_keys = primitives.agree(state.mask_key, mask_keys, state.sid, purpose)
            except Tampered as reason:
                raise SecAggAbort("shares", str(reason)) from None
            state.seed = primitives.private_key()
            holders = (*around, state.client) if parameters.complete else around
            of_seed = primitives.share(state.seed, parameters.threshold, holders)
            of_key = primitives.share(state.mask_key, parameters.threshold, holders)
            boxes = {}
            for v, text in zip(holders, map(bytes.__add__, of_seed, of_key), strict=True):
                if v == state.client:
                    state.shares[v] = text
                else:
                    boxes[v] = primitives.seal(state.box_keys[v], text, box_context(state.sid, state.client, v))
            state.cipher_key = state.mask_key = b""
            return Shares(state.client, primitives.commit(state.sid, state.client, state.seed), boxes)

    def masks(self, inbox: Inbox) -> Masks:
        """Third trip of a client that is several ranks: the masks, of which each rank applies its own slice once."""
        state = self._state
        with self._turn("masked input", after="shares"):
            if inbox.client != state.client or not set(inbox.boxes) <= set(state.box_keys):
                raise SecAggAbort("masked input", "the boxes are not from its neighbors to it")
            holders = len(inbox.boxes) + self.session.parameters.complete  # on a complete graph the client is one too
            self.session.enough(holders, "masked input", f"client {state.client}'s secrets")
            for v, box in inbox.boxes.items():
                try:
                    context = box_context(state.sid, v, state.client)
                    state.shares[v] = self._primitives.open(state.box_keys[v], box, context)
                except Tampered as reason:
                    raise SecAggAbort("masked input", f"client {v}'s share was tampered with: {reason}") from None
            state.present = (*inbox.boxes, state.client)
            added = [state.pair_keys[v] for v in inbox.boxes if v < state.client]
            added.append(self._primitives.derive(state.seed, state.sid, self.session.mask_purpose("self")))
            subtracted = [state.pair_keys[v] for v in inbox.boxes if v > state.client]
            state.seed, state.box_keys, state.pair_keys = b"", {}, {}
            return self._primitives.masks(self.session.sums.bits, added, subtracted)

    def agree(self, survivors: Survivors) -> Agreement:
        """The active profile's extra trip: signs who survived, once."""
        state = self._state
        with self._turn("agreement", after="masked input"):
            clients = once(survivors.clients, "agreement")
            if state.client not in clients or not clients <= set(state.present):
                raise SecAggAbort("agreement", "the survivors are not some of those who shared, this client among them")
            self.session.enough(len(clients), "agreement", "the survivors' secrets")
            state.agreed = tuple(sorted(clients))
            text = signed_survivors(state.sid, state.agreed)
            return Agreement(state.client, self._primitives.sign(state.identity, text))

    def unmask(self, request: UnmaskRequest) -> Unmasking:
        """Last trip: a share of each living client's seed or dead client's mask key, never both of the same client."""
        state, active = self._state, self.session.parameters.active
        with self._turn("unmask", after="agreement" if active else "masked input"):
            alive, dead = once(request.alive, "unmask"), once(request.dead, "unmask")
            if alive & dead:
                raise SecAggAbort("unmask", "a client is said to be both alive and dead")
            if alive | dead != set(state.present) or request.client != state.client:
                raise SecAggAbort("unmask", "the living and the dead are not those who shared")
            if state.client not in alive:
                raise SecAggAbort("unmask", "this client itself is said to be dead")
            self.session.enough(len(alive & set(state.shares)), "unmask", f"the secrets around client {state.client}")
            if active:
                self._check_agreed(alive, request.signatures)
            seeds = {v: state.shares[v][:SHARE_BYTES] for v in request.alive if v in state.shares}
            keys = {v: state.shares[v][SHARE_BYTES:] for v in request.dead}
            state.shares = {}
            return Unmasking(state.client, seeds, keys)

    @contextmanager
    def _turn(self, phase: Phase, after: str) -> Iterator[None]:
        """Runs one phase, once, after the phase `after`; any error ends the session for this client."""
        state = self._state
        try:
            if state.phase != after:
                raise SecAggAbort(phase, f"asked out of turn, after {state.phase!r} in place of {after!r}")
            yield
            state.phase = phase
        except Exception:
            self._state = Secrets(state.client, phase="aborted")
            raise

    def _check(self, listed: KeyList) -> None:
        """Aborts unless the server's list of keys is consistent with the session and with this client's keys."""
        state, parameters = self._state, self.session.parameters
        if (listed.degree, listed.threshold) != (parameters.degree, parameters.threshold):
            raise SecAggAbort("shares", "the server means to use another number of neighbors or another threshold")
        clients = once([keys.client for keys in listed.keys], "shares")
        fewest = parameters.threshold if parameters.complete else parameters.degree + 1
        if not fewest <= len(clients) <= parameters.clients:
            raise SecAggAbort("shares", f"{len(clients)} clients offer keys; it takes {fewest} to {parameters.clients}")
        echoed = [keys.cipher_key + keys.mask_key for keys in listed.keys if keys.client == state.client]
        if echoed != [state.offered]:
            raise SecAggAbort("shares", "the keys that this client offered are missing or altered")
        everything = [key for keys in listed.keys for key in (keys.cipher_key, keys.mask_key)]
        if len(set(everything)) != len(everything) or any(len(key) != KEY_BYTES for key in everything):
            raise SecAggAbort("shares", "a key is offered twice, or is not a key")
        if parameters.active:
            for keys in listed.keys:
                public = state.roster.get(keys.client, b"")
                if not self._primitives.signed(public, keys.signature, self.session.signed_keys(keys)):
                    raise SecAggAbort("shares", f"client {keys.client}'s keys are not signed by it")

    def _check_agreed(self, alive: set[int], signatures: Mapping[int, bytes]) -> None:
        """Aborts unless enough survivors signed the list of survivors that this client signed."""
        state = self._state
        if alive != set(state.agreed):
            raise SecAggAbort("unmask", "the living are not the survivors that this client signed")
        text = signed_survivors(state.sid, state.agreed)
        for v, signature in signatures.items():
            if v not in alive or not self._primitives.signed(state.roster.get(v, b""), signature, text):
                raise SecAggAbort("unmask", f"client {v}'s signature is not under the same survivors")
        self.session.enough(len(signatures), "unmask", "the secrets: others have not signed the survivors")
