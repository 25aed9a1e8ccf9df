"""What the server could know, counted out; and that no secret is printed, pickled or left lying about."""

import gc
import itertools
import pickle
import traceback
from dataclasses import asdict, replace

import numpy as np
import pytest

from strategies.secagg.parameters import choose
from strategies.secagg.protocol import SecAggAbort
from tests.strategies.secagg.conftest import masked_by, restored


def answers_to_any_view(play, u):
    """For each set of living and dead that u answers at all: of whom it gives shares of the seed, and of the key."""
    plain, answered = asdict(play.clients[u]._state), []
    present = plain["present"]
    for dead in itertools.chain.from_iterable(itertools.combinations(present, size) for size in range(len(present))):
        client = restored(play.clients[u])
        alive = tuple(v for v in present if v not in dead)
        try:
            answer = client.unmask(replace(play.asked[u], alive=alive, dead=dead))
        except SecAggAbort:
            continue
        answered.append((set(answer.seeds), set(answer.keys)))
    return answered


def most_shares(play, corrupt, target):
    """All pairs (shares of the seed, shares of the key) of `target` that a lying server can bring together."""
    helpers = sum(target in asdict(play.clients[u]._state)["shares"] for u in corrupt)  # these give both
    gives = []
    for u in play.ids:
        if u not in corrupt:
            views = answers_to_any_view(play, u)
            kinds = {(target in seeds, target in keys) for seeds, keys in views}
            assert (True, True) not in kinds
            gives.append(kinds)
    return {
        (helpers + sum(seed for seed, _ in picked), helpers + sum(key for _, key in picked))
        for picked in itertools.product(*gives)
    }


@pytest.mark.parametrize(("k", "share_corrupt"), [(7, 0.0), (7, 0.125), (7, 0.25), (4, 0.125)])
def test_no_lies_bring_both_secrets_of_a_client_together(k, share_corrupt, start, drawn):
    n, bad = 8, int(8 * share_corrupt)
    # on the ring: one corrupt neighbor of four, so t = ceil((1 + 4 - 1.25) / 2) + 1
    t = choose(n, share_corrupt, 0.05, semi_malicious=True).threshold if k == 7 else 3
    for threshold, safe in ((t, True), (t - 1, False)):
        play = start(n, k, threshold)
        play.to_keys()
        play.to_shares()
        play.to_masked(drawn(play))
        play.to_requests()
        for target in play.ids[bad:]:
            if k < 7 and not any(u in asdict(play.clients[target]._state)["shares"] for u in range(bad)):
                continue  # the ring's order is random, and no neighbor is corrupt
            pairs = most_shares(play, range(bad), target)
            assert all(seed < threshold or key < threshold for seed, key in pairs) == safe


def parts(thing, seen):
    """The bytes of everything that is reachable from a thing."""
    if id(thing) in seen or isinstance(thing, type):
        return
    seen[id(thing)] = thing
    if isinstance(thing, bytes | bytearray | memoryview):
        yield bytes(thing)
    elif isinstance(thing, np.ndarray):
        yield thing.tobytes()
    for inner in gc.get_referents(thing):
        if not hasattr(inner, "__globals__") and type(inner).__name__ != "module":
            yield from parts(inner, seen)


@pytest.mark.parametrize("mode", ["full", "ideal"])
def test_a_canary_in_an_update_never_reaches_the_server(mode, start):
    canary = np.frombuffer(b"the canary sings sixty-four bytes, and nobody but its client hears", np.uint32, 16)
    play = start(3, t=2, length=16, mode=mode)
    vectors = {u: np.concatenate([[1], canary if u == 1 else np.zeros(16)]).astype(np.uint32) for u in play.ids}
    play.to_keys()
    play.to_shares()
    masked = masked_by(play.clients[1], play.inboxes[1], vectors[1])
    play.server.add(masked)
    known = [play.server, play.messages, masked]
    seen = any(canary.tobytes() in part for part in parts(known, {}))
    assert seen == (mode == "ideal")  # where nothing is masked, the search finds it


def test_no_secret_is_printed(start, drawn):
    play = start(5, t=3, active=True)
    secrets = set()

    def look():
        for client in play.clients.values():
            plain = asdict(client._state)
            secrets.update(plain[name] for name in ("identity", "cipher_key", "mask_key", "seed"))
            for name in ("box_keys", "pair_keys", "shares"):
                secrets.update(plain[name].values())

    printed = []
    vectors = drawn(play)
    for trip in (play.to_keys, play.to_shares, lambda: play.to_masked(vectors, gone=[3]), play.to_requests):
        trip()
        look()
        printed += [repr(play.clients), str(play.clients[0]), repr(play.messages), repr(play.server), repr(vars(play))]
        printed += [repr(client._state) for client in play.clients.values()]
    answers = [play.clients[u].unmask(request) for u, request in play.asked.items()]
    for answer in answers:
        secrets.update([*answer.seeds.values(), *answer.keys.values()])
    masks = play.server.unmask(answers)
    secrets.update([*masks.added, *masks.subtracted])
    printed += [repr(answers), repr(masks), repr(play.server)]
    secrets.discard(b"")
    assert len(secrets) > 60
    for text in printed:
        for secret in secrets:
            assert secret.hex() not in text and repr(secret)[2:-1] not in text and str(list(secret)) not in text


def test_no_secret_is_in_an_abort(start):
    play = start(5, t=3)
    play.to_keys()
    inbox = play.to_shares()[2]
    plain = asdict(play.clients[2]._state)
    inbox.boxes[3] = bytes(94)
    with pytest.raises(SecAggAbort) as caught:
        play.clients[2].masks(inbox)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    text = "".join(traceback.format_exception(caught.value))
    secrets = [plain["seed"], *plain["box_keys"].values(), *plain["pair_keys"].values()]
    assert not any(secret.hex() in text or repr(secret)[2:-1] in text for secret in secrets)
    traveled = pickle.loads(pickle.dumps(caught.value))
    assert (traveled.phase, traveled.reason, str(traveled)) == (
        "masked input",
        caught.value.reason,
        str(caught.value),
    )


def test_clients_are_not_pickled(start):
    with pytest.raises(TypeError, match="secrets stay where they are"):
        pickle.dumps(start(3).clients[0])


def test_a_client_forgets_what_it_needs_no_more(start, drawn):
    play = start(5, t=3)
    play.to_keys()
    play.to_shares()
    plain = asdict(play.clients[0]._state)
    assert not plain["cipher_key"] and not plain["mask_key"] and plain["seed"]
    play.to_masked(drawn(play))
    plain = asdict(play.clients[0]._state)
    assert not plain["seed"] and not plain["box_keys"] and not plain["pair_keys"] and len(plain["shares"]) == 5
    play.to_requests()
    play.to_total()
    assert not asdict(play.clients[0]._state)["shares"]


def test_secrets_do_not_come_from_a_seed(start):
    keys = []
    for _ in range(2):
        np.random.seed(0)
        play = start(4, t=2, seed=0)
        listed = play.to_keys()
        play.to_shares()
        keys += [offer.cipher_key for offer in listed.keys] + [offer.mask_key for offer in listed.keys]
        keys += [asdict(client._state)["seed"] for client in play.clients.values()]
    assert len(set(keys)) == 24


def test_masked_vectors_of_equal_updates_have_nothing_in_common(start):
    play = start(4, t=3, length=4000)
    play.to_keys()
    play.to_shares()
    vectors = {u: np.ones(4001, np.uint32) for u in play.ids}
    masked = [masked_by(play.clients[u], play.inboxes[u], vectors[u]).values for u in play.ids]
    for a, b in itertools.combinations(masked, 2):
        assert (a == b).sum() < 3
    # without a dropped client's masks the rest stays hidden
    partial = sum(vector.astype(np.uint64) for vector in masked[:3]) % 2**32
    assert (partial == 3).sum() < 3
