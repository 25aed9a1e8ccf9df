"""Lies and corrupt shares in the last trip: the session ends with a phase and a reason, and no client gives a share."""

from dataclasses import replace

import pytest

from strategies.secagg.messages import Agreement, Survivors, Unmasking
from tests.strategies.secagg.conftest import restored


@pytest.fixture
def asked(play, drawn):
    """Six clients before the last trip: clients 4 and 5 have dropped out."""
    play.to_keys()
    play.to_shares()
    play.to_masked(drawn(play), gone=[4, 5])
    play.to_requests()
    return play


@pytest.mark.parametrize(
    ("alive", "dead", "reason"),
    [
        ((0, 1, 2, 3, 4), (4, 5), "both alive and dead"),
        ((0, 1, 3, 4), (2, 5), "itself is said to be dead"),
        ((0, 1, 2, 3, 9), (4, 5), "not those who shared"),
        ((0, 1, 2, 3), (4,), "not those who shared"),
        ((0, 1, 2, 3), (4, 5, 9), "not those who shared"),
        ((0, 1, 2, 3, 3), (4, 5), "named twice"),
        ((0, 1, 2, 3), (4, 5, 5), "named twice"),
        ((0, 1, 2), (3, 4, 5), "3 clients are left"),
        ((), (), "not those who shared"),
    ],
)
def test_a_request_that_would_reveal_is_refused(asked, alive, dead, reason, refused):
    client = asked.clients[2]
    refused("unmask", reason, lambda: client.unmask(replace(asked.asked[2], alive=alive, dead=dead)), client)
    # and a right one comes too late
    refused("unmask", "out of turn", lambda: client.unmask(asked.asked[2]), client)


def test_a_request_to_another_client_is_refused(asked, refused):
    refused("unmask", "not those who shared", lambda: asked.clients[2].unmask(asked.asked[3]), asked.clients[2])


def test_a_client_unmasks_once(asked, refused):
    first = asked.clients[2].unmask(asked.asked[2])
    assert set(first.seeds) == {0, 1, 2, 3} and set(first.keys) == {4, 5}
    refused("unmask", "out of turn", lambda: asked.clients[2].unmask(asked.asked[2]), asked.clients[2])


def test_nothing_is_unmasked_before_the_masked_input(play, refused):
    play.to_keys()
    play.to_shares()
    refused("unmask", "out of turn", lambda: play.clients[2].unmask(None), play.clients[2])


@pytest.fixture
def signed(start, drawn):
    """The active profile before the last trip: clients 4 and 5 have dropped out."""
    play = start(7, t=4, active=True)
    play.to_keys()
    play.to_shares()
    play.to_masked(drawn(play), gone=[4, 5])
    play.to_requests()
    return play


def test_a_split_view_is_refused(signed, refused):
    # one client is told that client 3, whose masked input came, has dropped out
    client = signed.clients[2]
    lie = replace(signed.asked[2], alive=(0, 1, 2, 6), dead=(3, 4, 5))
    refused("unmask", "not the survivors that this client signed", lambda: client.unmask(lie), client)


def test_a_split_view_from_the_agreement_on_finds_no_signatures(start, drawn, refused):
    play = start(7, t=4, active=True)
    play.to_keys()
    play.to_shares()
    play.to_masked(drawn(play), gone=[4, 5])
    play.survivors = Survivors((0, 1, 2, 6))  # for client 2 alone; the others sign the truth
    lied = play.clients[2].agree(play.survivors)
    truth = Survivors((0, 1, 2, 3, 6))
    honest = {u: play.clients[u].agree(truth) for u in (0, 1, 3, 6)}
    asked = play.server.requests(honest.values())
    signatures = {2: lied.signature} | {u: agreement.signature for u, agreement in honest.items() if u != 3}
    client = play.clients[2]
    lie = replace(asked[0], client=2, alive=(0, 1, 2, 6), dead=(3, 4, 5), signatures=signatures)
    refused("unmask", "signature is not under the same survivors", lambda: client.unmask(lie), client)


def test_too_few_or_strange_signatures_are_refused(signed, refused):
    request = signed.asked[2]
    for change, reason in (
        (dict(list(request.signatures.items())[:3]), "others have not signed"),
        (request.signatures | {4: request.signatures[0]}, "client 4's signature"),
        (request.signatures | {3: request.signatures[0]}, "client 3's signature"),
    ):
        client = restored(signed.clients[2])
        refused("unmask", reason, lambda: client.unmask(replace(request, signatures=change)), client)  # noqa: B023


def test_a_client_signs_once_and_only_what_can_be(start, drawn, refused):
    play = start(7, t=4, active=True)
    play.to_keys()
    play.to_shares()
    play.to_masked(drawn(play), gone=[4])
    cases = [((0, 1, 3), "not some of those"), ((0, 1, 2, 9), "not some of those"), ((0, 1, 2), "3 clients are left")]
    for clients, reason in [*cases, ((0, 1, 2, 2), "named twice")]:
        client = restored(play.clients[2])
        refused("agreement", reason, lambda: client.agree(Survivors(clients)), client)  # noqa: B023
    client = play.clients[2]
    client.agree(play.survivors)
    refused("agreement", "out of turn", lambda: client.agree(play.survivors), client)


def test_the_server_checks_signatures(start, drawn, refused):
    play = start(7, t=4, active=True)
    play.to_keys()
    play.to_shares()
    play.to_masked(drawn(play))
    agreed = [play.clients[u].agree(play.survivors) for u in play.ids]
    agreed[3] = Agreement(3, agreed[2].signature)
    refused("agreement", "client 3 did not sign", lambda: play.server.requests(agreed))


# Corrupt shares of honest secrets.


@pytest.mark.parametrize(
    ("which", "whose", "reason"),
    [("seeds", 1, "share of client 1's mask seed was tampered with"), ("keys", 4, "share of client 4's mask key was")],
)
@pytest.mark.parametrize("how", ["a flipped bit", "no share", "too large"])
def test_a_corrupt_share_is_found(asked, which, whose, reason, how, refused):
    answers = {u: asked.clients[u].unmask(request) for u, request in asked.asked.items()}
    shares = getattr(answers[0], which)
    flipped = shares[whose][:-1] + bytes([shares[whose][-1] ^ 1])
    shares[whose] = {"a flipped bit": flipped, "no share": b"", "too large": b"\xff" * 33}[how]
    refused("unmask", reason, lambda: asked.server.unmask(answers.values()))
    assert len(asked.server._total) == 0


def test_answers_to_what_was_not_asked_are_refused(start, drawn, refused):
    for change, reason in (
        (lambda answer: replace(answer, seeds=answer.seeds | {4: bytes(33)}), "not asked for"),
        (lambda answer: replace(answer, keys=answer.keys | {1: bytes(33)}), "not asked for"),
        (lambda answer: replace(answer, client=4), "client 4 has no part"),
        (lambda answer: replace(answer, client=1), "named twice"),
    ):
        play = start(6, t=4)
        play.to_keys()
        play.to_shares()
        play.to_masked(drawn(play), gone=[4, 5])
        play.to_requests()
        answers = [change(play.clients[0].unmask(play.asked[0]))]
        answers += [play.clients[u].unmask(play.asked[u]) for u in (1, 2, 3)]
        refused("unmask", reason, lambda: play.server.unmask(answers))  # noqa: B023


def test_on_a_ring_only_neighbors_hold_shares(start, drawn, refused):
    play = start(9, 4, 3)
    play.to_keys()
    play.to_shares()
    play.to_masked(drawn(play))
    play.to_requests()
    answers = {u: play.clients[u].unmask(request) for u, request in play.asked.items()}
    assert all(set(answer.seeds) == set(play.inboxes[u].boxes) for u, answer in answers.items())
    stranger = next(u for u in play.ids if u not in (0, *play.inboxes[0].boxes))
    answers[stranger].seeds[0] = bytes(33)
    refused("unmask", f"client {stranger} gave shares", lambda: play.server.unmask(answers.values()))


def test_on_a_ring_every_client_needs_t_neighbors(start, refused):
    play = start(9, 4, 4)
    play.to_keys()
    refused("shares", "3 clients are left to recover client", lambda: play.to_shares(gone=[5]))


def test_a_share_less_is_no_sum(asked, refused):
    answers = [asked.clients[u].unmask(request) for u, request in asked.asked.items()]
    answers[0] = Unmasking(answers[0].client, answers[0].seeds, {})
    refused("unmask", "3 clients are left to recover the mask key of client 4", lambda: asked.server.unmask(answers))


def test_the_server_goes_on_in_order_only(play, refused):
    refused("shares", "out of turn", lambda: play.server.inboxes([]))
    refused("keys", "out of turn", lambda: play.server.key_list([]))


def test_repeated_and_unknown_keys_are_refused(start, refused):
    for change, reason in (
        (lambda keys: [*keys, keys[0]], "twice"),
        (lambda keys: [*keys[1:], replace(keys[0], client=9)], "9"),
    ):
        play = start(6, t=4)
        keys = [client.keys() for client in play.clients.values()]
        refused("keys", reason, lambda: play.server.key_list(change(keys)))  # noqa: B023
