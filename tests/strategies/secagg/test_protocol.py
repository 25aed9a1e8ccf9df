"""Sessions in which everybody does as agreed, or is gone: the exact sum of who is left, or a clear end without one."""

import itertools
import random

import numpy as np
import pytest

from strategies.core.seeds import rng
from strategies.secagg.client import Client
from strategies.secagg.messages import MaskedSum
from strategies.secagg.parameters import choose
from strategies.secagg.protocol import SecAggAbort, Session
from strategies.secagg.ring import Sum, Sums
from strategies.secagg.server import SecAggServer
from tests.strategies.secagg.conftest import encoded_by, masked_by

FITS = [(n, b) for n in (2, 3, 10, 50, 200) for b in (8, 16, 20, 24, 32) if (2 ** (b - 1) - 1) // n >= 2]


def graph(n):
    """k and t: a ring for the large cohort, as 200 clients of a complete graph take minutes."""
    parameters = choose(n)
    return parameters.degree, parameters.threshold


def test_a_sum_in_real_numbers():
    n = 5
    sums = Sums((Sum("delta", 4, 2.0, "weighted"), Sum("rows", 1, 500, "noisy")), n)
    session = Session(3, 0, choose(n), sums)
    clients = {u: Client(session, u) for u in (2, 30, 31, 44, 500)}
    server = SecAggServer(session, list(clients))
    listed = server.key_list(client.keys() for client in clients.values())
    inboxes = server.inboxes(client.shares(listed) for client in clients.values())
    x = {u: np.array([0.5, -0.25, 5, u / 500], np.float32) for u in clients}
    for i, (u, client) in enumerate(clients.items()):
        encoded = encoded_by(sums, {"delta": x[u], "rows": np.array([10 * i])}, (i + 1) / 5, rng(1, 3, u, "encode"))
        server.add(masked_by(client, inboxes[u], encoded))
    assert server.survivors().clients == (2, 30, 31, 44, 500)
    server.unmask(clients[u].unmask(request) for u, request in server.requests().items())
    totals = sums.decode(server.total())
    assert totals.count == 5 and totals.sums["rows"].tolist() == [100]
    assert totals.weight == pytest.approx(3.0, abs=1e-7)
    expected = sum((i + 1) / 5 * x[u].clip(-2, 2).astype(float) for i, u in enumerate(clients))
    np.testing.assert_allclose(totals.sums["delta"], expected, atol=5 / sums.scale("delta"))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "bits"), FITS)
def test_full_is_ideal_bit_for_bit(n, bits, start, drawn, ring_sum, full):
    k, t = graph(n)
    for seed in range(-(-500 // len(FITS)) if full else 1):
        totals = []
        for mode in ("full", "ideal"):
            play = start(n, k, t, length=random.Random(seed).randrange(40), bits=bits, mode=mode, seed=seed)
            vectors = drawn(play, seed)
            totals.append(play.through(vectors))
        np.testing.assert_array_equal(totals[0], totals[1])
        np.testing.assert_array_equal(totals[0], ring_sum(vectors, play.ids, bits))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "ideal"])
@pytest.mark.parametrize(("n", "k", "t", "active"), [(10, 9, 6, False), (14, 8, 4, False), (10, 9, 6, True)])
def test_drop_outs_in_any_trip(n, k, t, active, mode, start, drawn, ring_sum, full):
    ends = {"sum": 0, "abort": 0}
    for drops in itertools.product((0, 1, n // 5), repeat=4):
        for seed in range(20 if full else 1):
            play = start(n, k, t, mode=mode, active=active, seed=seed)
            vectors = drawn(play, seed)
            order = random.Random(f"{seed}/{drops}").sample(play.ids, n)
            cuts = np.cumsum([0, *drops])
            gone = [order[: cuts[i + 1]] for i in range(4)]
            try:
                total = play.through(vectors, gone)
            except SecAggAbort as abort:
                assert abort.reason and not play.server._total.any()
                if k == n - 1:
                    assert n - len(gone[-1]) < t
                ends["abort"] += 1
            else:
                left = [u for u in play.ids if u not in gone[2]]
                np.testing.assert_array_equal(total, ring_sum(vectors, left))
                assert n - len(gone[-1]) >= t
                ends["sum"] += 1
    assert min(ends.values()) > 0


def test_full_and_ideal_end_alike(start, drawn):
    # the same drop-outs, also where a session is aborted: same phase, same number of bytes until then
    for drops in itertools.product((0, 2, 3), repeat=4):
        ends = []
        for mode in ("full", "ideal"):
            play = start(8, 7, 4, mode=mode)
            cuts = np.cumsum([0, *drops])
            try:
                play.through(drawn(play), [range(cuts[i + 1]) for i in range(4)])
                end = "sum"
            except SecAggAbort as abort:
                end = (abort.phase, abort.reason)
            ends.append((end, sum(message.nbytes for message in play.messages)))
        assert ends[0] == ends[1]


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("trip", range(4))
def test_exactly_t_survivors_are_enough(trip, active, start, drawn, ring_sum):
    n, t = 9, 6
    play = start(n, t=t, active=active)
    vectors = drawn(play)
    lost = range(n - t)
    total = play.through(vectors, [lost if i >= trip else () for i in range(4)])
    np.testing.assert_array_equal(total, ring_sum(vectors, play.ids if trip == 3 else play.ids[n - t :]))


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize(("trip", "phase"), list(enumerate(["keys", "shares", "masked input", "unmask"])))
def test_one_less_than_t_ends_the_session(trip, phase, active, start, drawn):
    n, t = 9, 6
    play = start(n, t=t, active=active)
    lost = range(n - t + 1)
    with pytest.raises(SecAggAbort) as caught:
        play.through(drawn(play), [lost if i >= trip else () for i in range(4)])
    assert caught.value.phase == phase and str(t) in caught.value.reason
    assert str(caught.value).startswith(f"secure aggregation was aborted in the phase '{phase}': 5 clients")
    assert len(play.server._total) == 0
    with pytest.raises(SecAggAbort):
        play.server.total()


def test_too_few_signatures_end_the_session(start, drawn):
    play = start(9, t=6, active=True)
    play.to_keys()
    play.to_shares()
    play.to_masked(drawn(play))
    with pytest.raises(SecAggAbort, match="in the phase 'agreement': 5 clients are left"):
        play.to_requests(gone=range(4))


def test_who_does_not_sign_is_not_asked(start, drawn, ring_sum):
    play = start(9, t=6, active=True)
    vectors = drawn(play)
    play.to_keys()
    play.to_shares()
    play.to_masked(vectors)
    assert set(play.to_requests(gone=[1, 5])) == set(play.ids) - {1, 5}
    np.testing.assert_array_equal(play.to_total(), ring_sum(vectors, play.ids))


def test_slots_add_before_they_send(start, drawn, ring_sum):
    play = start(6, t=4)
    vectors = drawn(play)
    play.to_keys()
    play.to_shares()
    for slot in ((0, 3, 5), (1, 4)):
        masked = [masked_by(play.clients[u], play.inboxes[u], vectors[u].copy()) for u in slot]
        values = np.sum([message.values for message in masked], axis=0, dtype=np.uint32)
        added = MaskedSum(slot, values, masked[0].vector_bytes)
        assert added.clients == slot and added.nbytes == len(slot) * (4 + 40)
        play.server.add(added)
    play.survivors = play.server.survivors()
    play.to_requests()
    np.testing.assert_array_equal(play.to_total(), ring_sum(vectors, [0, 3, 5, 1, 4]))


@pytest.mark.parametrize("bits", [20, 32])
def test_ranks_mask_their_own_shards(bits, start, drawn, ring_sum):
    play = start(5, t=3, length=29, bits=bits)
    vectors = drawn(play)
    play.server = SecAggServer(play.session, play.ids, hold=1)
    play.to_keys()
    play.to_shares()
    cuts = [slice(0, 1), slice(1, 10), slice(10, 27), slice(27, 30)]
    totals = [np.zeros(cut.stop - cut.start, np.uint32) for cut in cuts]
    for u in (0, 1, 3, 4):
        masks = play.clients[u].masks(play.inboxes[u])
        for cut, total in zip(cuts, totals, strict=True):
            part = vectors[u][cut].copy()
            masks.apply(part, cut.start)
            total += part
            if cut.start == 0:
                play.server.add(MaskedSum((u,), part, play.session.sums.nbytes))
    play.server.survivors()
    asked = play.server.requests()
    removals = play.server.unmask(play.clients[u].unmask(request) for u, request in asked.items())
    for cut, total in zip(cuts, totals, strict=True):
        removals.apply(total, cut.start)
    assert play.server.total().tolist() == [4]
    np.testing.assert_array_equal(np.concatenate(totals), ring_sum(vectors, [0, 1, 3, 4], bits))


def test_bytes_on_the_wire_by_hand(start, drawn):
    play = start(5, t=3, length=9, bits=20)
    play.through(drawn(play))
    sizes = {}
    for message in play.messages:
        sizes.setdefault(type(message).__name__, set()).add(message.nbytes)
    assert sizes == {
        "Keys": {4 + 2 * 32},
        "KeyList": {5 * 68 + 8},
        "Shares": {4 + 32 + 4 * (4 + 12 + 66 + 16)},
        "Inbox": {4 * 98},
        "MaskedSum": {4 + 25},  # 10 coordinates of 20 bits
        "UnmaskRequest": {5 * 4},
        "Unmasking": {4 + 5 * (4 + 33)},
    }


def test_sessions_that_do_not_fit_together_are_refused(start):
    sums = Sums((Sum("delta", 3, 1.0),), 5)
    with pytest.raises(ValueError, match="made for 5 clients, and 6 are invited"):
        Session(0, 0, choose(6), sums)
    session = Session(0, 0, choose(5), sums)
    with pytest.raises(ValueError, match="4 clients are invited, and the session is for 5"):
        SecAggServer(session, [1, 2, 3, 4, 4])
    active = Session(0, 0, choose(5, active=True), sums)
    with pytest.raises(ValueError, match="identity key"):
        SecAggServer(active, range(5))
    with pytest.raises(ValueError, match="identity key"):
        Client(active, 0)
