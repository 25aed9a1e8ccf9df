"""Parties that do not do as agreed before the last trip: the session ends with a phase and a reason."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from strategies.secagg.client import Client
from strategies.secagg.messages import KeyList, Keys, MaskedSum
from strategies.secagg.primitives import Primitives
from strategies.secagg.protocol import SecAggAbort, Session
from tests.strategies.secagg.conftest import masked_by, restored

LOW_ORDER = (1).to_bytes(32, "little")
OTHER = Primitives().public_key(Primitives().private_key())


# Keys.


def own_altered(keys):
    return tuple(replace(offer, mask_key=OTHER) if offer.client == 2 else offer for offer in keys)


def own_missing(keys):
    return tuple(offer for offer in keys if offer.client != 2)


def own_twice(keys):
    return (*keys, next(offer for offer in keys if offer.client == 2))


def same_key_of_two(keys):
    taken = next(offer for offer in keys if offer.client == 1)
    return tuple(replace(offer, cipher_key=taken.cipher_key) if offer.client == 3 else offer for offer in keys)


def same_key_for_both(keys):
    return tuple(replace(offer, mask_key=offer.cipher_key) if offer.client == 3 else offer for offer in keys)


def low_order_cipher_key(keys):
    return tuple(replace(offer, cipher_key=LOW_ORDER) if offer.client == 3 else offer for offer in keys)


def low_order_mask_key(keys):
    return tuple(replace(offer, mask_key=LOW_ORDER) if offer.client == 3 else offer for offer in keys)


def short_key(keys):
    return tuple(replace(offer, mask_key=OTHER[:31]) if offer.client == 3 else offer for offer in keys)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_altered, "missing or altered"),
        (own_missing, "missing or altered"),
        (own_twice, "named twice"),
        (same_key_of_two, "offered twice"),
        (same_key_for_both, "offered twice"),
        (low_order_cipher_key, "client 3 offers a key of low order"),
        (low_order_mask_key, "client 3 offers a key of low order"),
        (short_key, "or is not a key"),
        (lambda keys: keys[:3], "3 clients offer keys; it takes 4 to 6"),
        (lambda keys: (*keys, Keys(9, OTHER, bytes(32))), "7 clients offer keys"),
    ],
)
def test_a_list_of_keys_that_cannot_be_is_refused(play, change, reason, refused):
    listed = play.to_keys()
    client = play.clients[2]
    refused("shares", reason, lambda: client.shares(replace(listed, keys=change(listed.keys))), client)


@pytest.mark.parametrize("change", [{"threshold": 3}, {"threshold": 5}, {"degree": 4}])
def test_other_parameters_than_agreed_are_refused(play, change, refused):
    listed = replace(play.to_keys(), **change)
    refused("shares", "another number", lambda: play.clients[2].shares(listed), play.clients[2])


def test_a_ring_needs_its_neighbors(start):
    play = start(9, 6, 4)
    with pytest.raises(SecAggAbort, match="6 clients offered keys, and it takes 7"):
        play.to_keys(gone=[0, 1, 2])


def test_clients_with_different_sessions_do_not_open_each_others_boxes(play, refused):
    listed = play.to_keys()
    other = KeyList(listed.keys[::-1], listed.degree, listed.threshold)  # another order: another ring, another session
    shares = [client.shares(other if u == 3 else listed) for u, client in play.clients.items()]
    inbox = play.server.inboxes(shares)[2]
    values = np.zeros(10, np.uint32)
    refused("masked input", "client 3's share was tampered with", lambda: masked_by(play.clients[2], inbox, values))
    assert not values.any()


def test_every_fact_of_a_session_is_in_its_identity(play, start):
    listed = play.to_keys()
    sessions = [play.session, *(start(6, t=4, **change).session for change in ({"round": 1}, {"attempt": 1}))]
    sessions += [start(6, t=5).session, start(6, k=4, t=4).session, start(6, t=4, mode="ideal").session]
    sessions += [start(6, t=4, length=8).session, start(6, t=4, bits=31).session, start(6, t=4, active=True).session]
    identities = [session.identity(listed) for session in sessions]
    identities += [play.session.identity(replace(listed, keys=keys)) for keys in (listed.keys[1:], listed.keys[::-1])]
    identities.append(play.session.identity(replace(listed, keys=own_altered(listed.keys))))
    assert len(set(identities)) == len(identities)


def test_unsigned_keys_are_refused(start, refused):
    play = start(6, t=4, active=True)
    listed = play.to_keys()
    for change in (
        lambda offer: replace(offer, signature=bytes(64)),
        lambda offer: replace(offer, mask_key=OTHER),
        lambda offer: replace(offer, client=4),
    ):
        keys = tuple(change(offer) if offer.client == 3 else offer for offer in listed.keys if offer.client != 4)
        client = restored(play.clients[2])
        refused("shares", "not signed by it", lambda: client.shares(replace(listed, keys=keys)), client)  # noqa: B023


def test_signed_keys_of_another_round_are_refused(start, refused):
    play = start(6, t=4, active=True)
    listed = play.to_keys()
    later = Session(1, 0, play.session.parameters, play.session.sums)
    plain = asdict(play.clients[2]._state)
    client = Client(later, 2, plain["identity"], play.roster)
    offered = client.keys()
    keys = tuple(offered if offer.client == 2 else offer for offer in listed.keys)
    refused("shares", "not signed by it", lambda: client.shares(replace(listed, keys=keys)), client)


# Shares.


@pytest.mark.parametrize("place", ["nonce", "text", "tag"])
def test_a_flipped_bit_in_a_box_is_refused(play, place, refused):
    play.to_keys()
    inbox = play.to_shares()[2]
    box = bytearray(inbox.boxes[3])
    box[{"nonce": 0, "text": 40, "tag": -1}[place]] ^= 1
    inbox.boxes[3] = bytes(box)
    act = lambda: masked_by(play.clients[2], inbox, np.zeros(10, np.uint32))  # noqa: E731
    refused("masked input", "client 3's share was tampered with", act, play.clients[2])


def test_swapped_senders_are_refused(play, refused):
    play.to_keys()
    inbox = play.to_shares()[2]
    inbox.boxes[3], inbox.boxes[4] = inbox.boxes[4], inbox.boxes[3]
    refused("masked input", "tampered", lambda: play.clients[2].masks(inbox), play.clients[2])


def test_a_box_that_is_sent_back_is_refused(play, refused):
    listed = play.to_keys()
    sent = {u: client.shares(listed) for u, client in play.clients.items()}
    inbox = play.server.inboxes(sent.values())[2]
    inbox.boxes[3] = sent[2].boxes[3]
    refused("masked input", "client 3's share was tampered", lambda: play.clients[2].masks(inbox), play.clients[2])


def test_boxes_of_another_session_are_refused(play, start, refused):
    play.to_keys()
    inbox = play.to_shares()[2]
    other = start(6, t=4)
    other.to_keys()
    inbox.boxes[3] = other.to_shares()[2].boxes[3]
    refused("masked input", "client 3's share was tampered", lambda: play.clients[2].masks(inbox), play.clients[2])


def test_boxes_for_or_from_others_are_refused(play, refused):
    play.to_keys()
    inboxes = play.to_shares()
    refused("masked input", "not from its neighbors", lambda: play.clients[2].masks(inboxes[3]), play.clients[2])
    inboxes[1].boxes[9] = inboxes[1].boxes[0]
    refused("masked input", "not from its neighbors", lambda: play.clients[1].masks(inboxes[1]), play.clients[1])


def test_an_inbox_of_too_few_is_refused(play, refused):
    play.to_keys()
    inbox = play.to_shares()[2]
    for u in (0, 1, 3):
        del inbox.boxes[u]
    refused("masked input", "3 clients are left", lambda: play.clients[2].masks(inbox), play.clients[2])


def test_the_server_refuses_incomplete_shares(play, start, refused):
    for change in (
        lambda shares: shares.boxes.pop(3),
        lambda shares: shares.boxes.update({9: shares.boxes[3]}),
        lambda shares: shares.boxes.update({3: b""}),
    ):
        play = start(6, t=4)
        listed = play.to_keys()
        sent = [client.shares(listed) for client in play.clients.values()]
        change(sent[2])
        refused("shares", "client 2 did not send", lambda: play.server.inboxes(sent))  # noqa: B023


# Masked inputs.


def test_a_second_masked_input_is_refused(play, drawn, refused):
    play.to_keys()
    inboxes = play.to_shares()
    first = masked_by(play.clients[2], inboxes[2], drawn(play)[2])
    act = lambda: masked_by(play.clients[2], inboxes[2], drawn(play)[2])  # noqa: E731
    refused("masked input", "out of turn", act, play.clients[2])
    play.server.add(first)
    refused("masked input", "client 2 gave a second", lambda: play.server.add(first))
    assert len(play.server._total) == 0


@pytest.mark.parametrize(
    ("values", "clients", "reason"),
    [
        (np.zeros(9, np.uint32), (2,), "not of the agreed length"),
        (np.zeros(10, np.int64), (2,), "not of the agreed length"),
        (np.zeros(10, np.uint32), (9,), "client 9 has no part"),
        (np.zeros(10, np.uint32), (2, 2), "named twice"),
    ],
)
def test_masked_inputs_that_cannot_be_are_refused(play, values, clients, reason, refused):
    play.to_keys()
    play.to_shares()
    refused("masked input", reason, lambda: play.server.add(MaskedSum(clients, values, 40)))


def test_a_vector_without_the_counting_one_is_found(play, drawn):
    vectors = drawn(play)
    vectors[3][0] = 2
    with pytest.raises(SecAggAbort, match="coordinate that counts clients is wrong"):
        play.through(vectors)
    assert len(play.server._total) == 0
