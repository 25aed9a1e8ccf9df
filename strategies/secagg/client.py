"""A client of secure aggregation: a state machine that gives each message once and forgets its secrets early.

Bell et al. 2020, algorithm 3; Bonawitz et al. 2017, figure 4, for the active profile. Any message that is out of turn
or malformed aborts the session for this client: it forgets everything and answers nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NoReturn

from strategies.secagg.masks import Masks
from strategies.secagg.messages import Agreement, Inbox, KeyList, Keys, Shares, Survivors, Unmasking, UnmaskRequest
from strategies.secagg.parameters import holders, neighbors
from strategies.secagg.primitives import KEY_BYTES, Tampered
from strategies.secagg.protocol import Party, Session, abort_unless, box_context, once, signed_survivors
from strategies.secagg.shamir import SHARE_BYTES


@dataclass(repr=False)
class Secrets:
    """What a client keeps between messages; it is never printed.

    `shares` is by author: a share of the mask seed, then of the private mask key. `box_keys` and `pair_keys` have one
    key for each neighbor; the private keys that they come from are erased before.
    """

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


class Client(Party):
    """Plays one session. In the active profile `identity` is its private Ed25519 key, `roster` everybody's public one.

    Both come from outside the session, since the server could lie about them.
    """

    def __init__(self, session: Session, client: int, identity: bytes = b"", roster: Mapping[int, bytes] = {}) -> None:
        if session.parameters.active and not (identity and roster):
            raise ValueError("the active profile needs the client's identity key and everybody's public ones")
        super().__init__(session)
        self._client = client
        self._state = Secrets(identity, dict(roster))

    def __repr__(self) -> str:
        return f"Client({self._client}, phase={self._phase!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client's secrets stay where they are: they do not travel")

    def keys(self) -> Keys:
        """First trip: fresh keys, one to encrypt shares, one to agree on masks."""
        state, primitives = self._state, self._primitives
        with self._turn("keys", after=""):
            state.cipher_key, state.mask_key = primitives.private_key(), primitives.private_key()
            keys = Keys(self._client, *(primitives.public_key(key) for key in (state.cipher_key, state.mask_key)))
            state.offered = keys.cipher_key + keys.mask_key
            if not self.session.parameters.active:
                return keys
            return replace(keys, signature=primitives.sign(state.identity, self.session.signed_keys(keys)))

    def shares(self, listed: KeyList) -> Shares:
        """Second trip: checks the keys, draws the mask seed and shares it and the private mask key."""
        state, primitives, parameters = self._state, self._primitives, self.session.parameters
        with self._turn("shares", after="keys"):
            self._check(listed)
            state.sid = self.session.identity(listed)
            order = [keys.client for keys in listed.keys]
            around = neighbors(order, order.index(self._client), parameters)
            public = {keys.client: keys for keys in listed.keys}
            cipher_keys = {v: public[v].cipher_key for v in around}
            mask_keys = {v: public[v].mask_key for v in around}
            state.box_keys = primitives.agree(state.cipher_key, cipher_keys, state.sid, b"fedpost secagg box")
            state.pair_keys = primitives.agree(state.mask_key, mask_keys, state.sid, self.session.mask_purpose("pair"))
            state.seed = primitives.private_key()
            of = holders(self._client, around, parameters)
            of_seed, of_key = (primitives.share(x, parameters.threshold, of) for x in (state.seed, state.mask_key))
            texts = dict(zip(of, map(bytes.__add__, of_seed, of_key), strict=True))
            state.shares = {v: texts.pop(v) for v in (self._client,) if v in texts}
            contexts = {v: box_context(state.sid, self._client, v) for v in texts}
            boxes = {v: primitives.seal(state.box_keys[v], text, contexts[v]) for v, text in texts.items()}
            state.cipher_key = state.mask_key = b""
            return Shares(self._client, primitives.commit(state.sid, self._client, state.seed), boxes)

    def masks(self, inbox: Inbox) -> Masks:
        """Third trip: the masks of the ring vector, of which each rank of a client applies its own slice once."""
        state, client = self._state, self._client
        with self._turn("masked input", after="shares"):
            meant = inbox.client == client and set(inbox.boxes) <= set(state.box_keys)
            abort_unless(meant, "masked input", "the boxes are not from its neighbors to it")
            among = len(holders(client, tuple(inbox.boxes), self.session.parameters))
            self.session.enough(among, "masked input", f"client {client}'s secrets")
            for v, box in inbox.boxes.items():
                try:
                    state.shares[v] = self._primitives.open(state.box_keys[v], box, box_context(state.sid, v, client))
                except Tampered as reason:
                    raise Tampered(f"client {v}'s share was tampered with: {reason}") from None
            state.present = (*inbox.boxes, client)
            added = [state.pair_keys[v] for v in inbox.boxes if v < client]
            added.append(self._primitives.derive(state.seed, state.sid, self.session.mask_purpose("self")))
            subtracted = [state.pair_keys[v] for v in inbox.boxes if v > client]
            state.seed, state.box_keys, state.pair_keys = b"", {}, {}
            return self._primitives.masks(self.session.sums.bits, added, subtracted)

    def agree(self, survivors: Survivors) -> Agreement:
        """The active profile's extra trip: signs who survived, once."""
        state = self._state
        with self._turn("agreement", after="masked input"):
            clients = once(survivors.clients, "agreement")
            among = self._client in clients and clients <= set(state.present)
            reason = "the survivors are not some of those who shared, this client among them"
            abort_unless(among, "agreement", reason)
            self.session.enough(len(clients), "agreement", "the survivors' secrets")
            state.agreed = tuple(sorted(clients))
            text = signed_survivors(state.sid, state.agreed)
            return Agreement(self._client, self._primitives.sign(state.identity, text))

    def unmask(self, request: UnmaskRequest) -> Unmasking:
        """Last trip: a share of each living client's seed or dead client's mask key, never both of the same client."""
        state, active = self._state, self.session.parameters.active
        with self._turn("unmask", after="agreement" if active else "masked input"):
            alive, dead = once(request.alive, "unmask"), once(request.dead, "unmask")
            abort_unless(not alive & dead, "unmask", "a client is said to be both alive and dead")
            known = alive | dead == set(state.present) and request.client == self._client
            abort_unless(known, "unmask", "the living and the dead are not those who shared")
            abort_unless(self._client in alive, "unmask", "this client itself is said to be dead")
            self.session.enough(len(alive & set(state.shares)), "unmask", f"the secrets around client {self._client}")
            if active:
                self._check_agreed(alive, request.signatures)
            seeds = {v: state.shares[v][:SHARE_BYTES] for v in request.alive if v in state.shares}
            keys = {v: state.shares[v][SHARE_BYTES:] for v in request.dead}
            state.shares = {}
            return Unmasking(self._client, seeds, keys)

    def _forget(self) -> None:
        self._state = Secrets()

    def _check(self, listed: KeyList) -> None:
        """Aborts unless the server's list of keys is consistent with the session and with this client's keys."""
        state, parameters = self._state, self.session.parameters
        graph = (listed.degree, listed.threshold) == (parameters.degree, parameters.threshold)
        abort_unless(graph, "shares", "the server means to use another number of neighbors or another threshold")
        n, fewest = len(once([keys.client for keys in listed.keys], "shares")), parameters.fewest
        most = parameters.clients
        abort_unless(fewest <= n <= most, "shares", f"{n} clients offer keys; it takes {fewest} to {most}")
        echoed = [keys.cipher_key + keys.mask_key for keys in listed.keys if keys.client == self._client]
        abort_unless(echoed == [state.offered], "shares", "the keys that this client offered are missing or altered")
        every = [key for keys in listed.keys for key in (keys.cipher_key, keys.mask_key)]
        proper = len(set(every)) == len(every) and all(len(key) == KEY_BYTES for key in every)
        abort_unless(proper, "shares", "a key is offered twice, or is not a key")
        for keys in listed.keys if parameters.active else ():
            public = state.roster.get(keys.client, b"")
            signed = self._primitives.signed(public, keys.signature, self.session.signed_keys(keys))
            abort_unless(signed, "shares", f"client {keys.client}'s keys are not signed by it")

    def _check_agreed(self, alive: set[int], signatures: Mapping[int, bytes]) -> None:
        """Aborts unless enough survivors signed the list of survivors that this client signed."""
        state = self._state
        same = alive == set(state.agreed)
        abort_unless(same, "unmask", "the living are not the survivors that this client signed")
        text = signed_survivors(state.sid, state.agreed)
        for v, signature in signatures.items():
            agrees = v in alive and self._primitives.signed(state.roster.get(v, b""), signature, text)
            abort_unless(agrees, "unmask", f"client {v}'s signature is not under the same survivors")
        self.session.enough(len(signatures), "unmask", "the secrets: others have not signed the survivors")
