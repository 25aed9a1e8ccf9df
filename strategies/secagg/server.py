"""The server of secure aggregation: a state machine that relays, adds masked vectors, and takes the masks out.

Bell et al. 2020, algorithm 2. Clients that do not answer a trip have dropped out. A server that cannot finish aborts,
wipes what it has added, and has no partial result.
"""

import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from strategies.secagg.masks import Masks
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
from strategies.secagg.parameters import holders, neighbors
from strategies.secagg.primitives import BOX_BYTES, HASH_BYTES, Tampered
from strategies.secagg.protocol import Party, Phase, SecAggAbort, Session, abort_unless, once, signed_survivors
from strategies.secagg.shamir import Reconstruction


class SecAggServer(Party):
    """Plays one session with the invited clients.

    It adds up the first `hold` coordinates of the vectors, by default all. Where vectors are in shards, ranks add up
    theirs, the server the head (`Sums.encode_head`), and each rank applies what `unmask` gives to its own.
    """

    def __init__(
        self,
        session: Session,
        invited: Sequence[int],
        hold: int | None = None,
        roster: Mapping[int, bytes] | None = None,
    ) -> None:
        super().__init__(session)
        self._invited = frozenset(invited)
        if len(self._invited) != (clients := session.parameters.clients):
            raise ValueError(f"{len(self._invited)} clients are invited, and the session is for {clients}")
        if session.parameters.active and not roster:
            raise ValueError("the active profile needs everybody's public identity key")
        self._roster = dict(roster or {})
        self._hold = session.sums.length if hold is None else hold
        self._total = np.zeros(0, np.uint32)
        self._forget()

    def _forget(self) -> None:
        self._total.fill(0)
        self._total = np.zeros(0, np.uint32)
        self._sid = b""
        self._around: dict[int, tuple[int, ...]] = {}  # each client's neighbors
        self._holders: dict[int, tuple[int, ...]] = {}  # who holds shares of its secrets
        self._mask_keys: dict[int, bytes] = {}
        self._commitments: dict[int, bytes] = {}  # of all who shared: U2
        self._arrived: set[int] = set()  # whose masked input is in: U3
        self._asked: set[int] = set()
        self._removals = Masks(self.session.sums.bits)

    def __repr__(self) -> str:
        return f"SecAggServer(round={self.session.round}, attempt={self.session.attempt}, phase={self._phase!r})"

    def key_list(self, keys: Iterable[Keys]) -> KeyList:
        """Ends the first trip: everybody's keys, in a random order that places clients on the ring."""
        parameters = self.session.parameters
        with self._turn("keys", after=""):
            offered = list(keys)
            clients = self._known([key.client for key in offered], self._invited, "keys")
            n, fewest = len(clients), parameters.fewest
            abort_unless(n >= fewest, "keys", f"{n} clients offered keys, and it takes {fewest}")
            random.SystemRandom().shuffle(offered)
            listed = KeyList(tuple(offered), parameters.degree, parameters.threshold)
            order = [key.client for key in offered]
            self._sid = self.session.identity(listed)
            self._around = {u: neighbors(order, place, parameters) for place, u in enumerate(order)}
            self._holders = {u: holders(u, near, parameters) for u, near in self._around.items()}
            self._mask_keys = {key.client: key.mask_key for key in offered}
            return listed

    def inboxes(self, shares: Iterable[Shares]) -> dict[int, Inbox]:
        """Ends the second trip: for each client that shared, the boxes that the others sealed for it."""
        with self._turn("shares", after="keys"):
            sent = list(shares)
            self._known([message.client for message in sent], self._around.keys(), "shares")
            for message in sent:
                to_all = set(message.boxes) == set(self._around[message.client])
                proper = {len(box) for box in message.boxes.values()} == {BOX_BYTES}
                proper = proper and to_all and len(message.commitment) == HASH_BYTES
                abort_unless(proper, "shares", f"client {message.client} did not send a share to each of its neighbors")
            self._commitments = {message.client: message.commitment for message in sent}
            self._recoverable(self._commitments.keys(), "shares")
            self._total = np.zeros(self._hold, np.uint32)
            boxes = {u: {m.client: m.boxes[u] for m in sent if u in m.boxes} for u in self._commitments}
            return {u: Inbox(u, sealed) for u, sealed in boxes.items()}

    def add(self, masked: MaskedSum) -> None:
        """Third trip: adds a masked vector, or a slot's sum of them."""
        with self._turn("masked input", after="shares", reached="shares"):
            clients = self._known(masked.clients, self._commitments.keys(), "masked input")
            if again := clients & self._arrived:
                raise SecAggAbort("masked input", f"client {min(again)} gave a second masked input")
            agreed = masked.values.shape == self._total.shape and masked.values.dtype == np.uint32
            abort_unless(agreed, "masked input", f"the vector of {len(clients)} clients is not of the agreed length")
            self._total += masked.values
            self._arrived |= clients

    def survivors(self) -> Survivors:
        """Ends the third trip: whose masked input arrived; aborts if a secret could not be recovered."""
        with self._turn("masked input", after="shares"):
            self._recoverable(self._arrived, "masked input")
            return Survivors(tuple(sorted(self._arrived)))

    def requests(self, agreements: Iterable[Agreement] = ()) -> dict[int, UnmaskRequest]:
        """Begins the last trip: requests to all survivors, in the active profile to those who agreed."""
        active = self.session.parameters.active
        signatures = self._agreed(list(agreements)) if active else {}
        with self._turn("unmask", after="agreement" if active else "masked input", reached="asked"):
            self._asked = set(signatures if active else self._arrived)
            requests = {}
            for u in sorted(self._asked):
                near = [v for v in (*self._around[u], u) if v in self._commitments]
                alive = tuple(v for v in near if v in self._arrived)
                dead = tuple(v for v in near if v not in self._arrived)
                requests[u] = UnmaskRequest(u, alive, dead, signatures)
            return requests

    def unmask(self, answers: Iterable[Unmasking]) -> Masks:
        """Ends the last trip: the masks that remove from the sum what does not cancel, from recovered secrets."""
        with self._turn("unmask", after="asked"):
            given = list(answers)
            self._known([answer.client for answer in given], self._asked, "unmask")
            seeds: dict[int, dict[int, bytes]] = {u: {} for u in self._arrived}
            keys: dict[int, dict[int, bytes]] = {u: {} for u in self._commitments if u not in self._arrived}
            for answer in given:
                for shares, place in ((answer.seeds, seeds), (answer.keys, keys)):
                    for u, share in shares.items():
                        wanted = u in place and answer.client in self._holders[u]
                        abort_unless(wanted, "unmask", f"client {answer.client} gave shares that it was not asked for")
                        place[u][answer.client] = share
            self._removals = self._masks_of(seeds, keys)
            return self._removals

    def total(self) -> np.ndarray:
        """The sum of the survivors' ring vectors (hold,) uint32, handed over."""
        with self._turn("unmask", after="unmask", reached="total"):
            self._removals.apply(self._total)
            counted = not len(self._total) or self._total[0] == len(self._arrived)
            abort_unless(counted, "unmask", "the coordinate that counts clients is wrong: a vector was not as agreed")
            total, self._total = self._total, np.zeros(0, np.uint32)
            return total

    def _masks_of(self, seeds: dict[int, dict[int, bytes]], keys: dict[int, dict[int, bytes]]) -> Masks:
        """The negation of the survivors' own masks and of those that they share with the dead."""
        primitives, session = self._primitives, self.session
        reconstruction = Reconstruction(session.parameters.threshold)
        added, subtracted = list[bytes](), list[bytes]()
        for u, shares in sorted(seeds.items()):
            session.enough(len(shares), "unmask", f"the mask of client {u}")
            seed = primitives.recover(reconstruction, shares)
            if seed is None or primitives.commit(self._sid, u, seed) != self._commitments[u]:
                raise Tampered(f"a share of client {u}'s mask seed was tampered with: it committed to another")
            subtracted.append(primitives.derive(seed, self._sid, session.mask_purpose("self")))
        for u, shares in sorted(keys.items()):
            session.enough(len(shares), "unmask", f"the mask key of client {u}, which dropped out")
            key = primitives.recover(reconstruction, shares)
            if key is None or not primitives.owns(key, self._mask_keys[u]):
                raise Tampered(f"a share of client {u}'s mask key was tampered with: its public key differs")
            public = {v: self._mask_keys[v] for v in self._around[u] if v in self._arrived}
            pairs = primitives.agree(key, public, self._sid, session.mask_purpose("pair"))
            added += [pair for v, pair in pairs.items() if v < u]  # v had subtracted these
            subtracted += [pair for v, pair in pairs.items() if v > u]
        return primitives.masks(session.sums.bits, added, subtracted)

    def _agreed(self, agreements: list[Agreement]) -> dict[int, bytes]:
        """The survivors' signatures."""
        with self._turn("agreement", after="masked input"):
            self._known([agreement.client for agreement in agreements], self._arrived, "agreement")
            text = signed_survivors(self._sid, self._arrived)
            for agreement in agreements:
                public = self._roster.get(agreement.client, b"")
                signed = self._primitives.signed(public, agreement.signature, text)
                abort_unless(signed, "agreement", f"client {agreement.client} did not sign these survivors")
            self.session.enough(len(agreements), "agreement", "the survivors' secrets")
            return {agreement.client: agreement.signature for agreement in agreements}

    def _recoverable(self, left: Iterable[int], phase: Phase) -> None:
        """Aborts unless enough of those left hold shares of the secrets of each client that shared."""
        present = set(left)
        for u in sorted(self._commitments):
            self.session.enough(len(present.intersection(self._holders[u])), phase, f"client {u}'s secrets")
        self.session.enough(len(present), phase, "anything")

    def _known(self, clients: Sequence[int], among: Iterable[int], phase: Phase) -> set[int]:
        """The clients as a set; aborts if a client is named twice or is not expected."""
        known = once(clients, phase)
        if strangers := known.difference(among):
            raise SecAggAbort(phase, f"client {min(strangers)} has no part in this")
        return known
