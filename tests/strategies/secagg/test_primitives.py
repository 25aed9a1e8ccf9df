"""The primitives against published vectors, and the boxes against everything that could be done to them."""

import os

import pytest

from strategies.secagg.primitives import BOX_BYTES, PRIMITIVES, Tampered
from strategies.secagg.protocol import box_context
from strategies.secagg.shamir import Reconstruction

FULL = PRIMITIVES["full"]
TEXT = bytes(range(66))
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
# Points whose order divides 8: 0, 1, two of order 8, p - 1, p and p + 1 (curve25519's, as in RFC 7748's section 6.1)
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    *((2**255 - 19 + i).to_bytes(32, "little") for i in (-1, 0, 1)),
]


def test_x25519_rfc_7748_section_6_1():
    public = {"alice": FULL.public_key(ALICE), "bob": FULL.public_key(BOB)}
    assert public["alice"].hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public["bob"].hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    expected = {5: FULL.derive(shared, b"salt", b"purpose")}
    assert FULL.agree(ALICE, {5: public["bob"]}, b"salt", b"purpose") == expected
    assert FULL.agree(BOB, {5: public["alice"]}, b"salt", b"purpose") == expected
    assert FULL.owns(ALICE, public["alice"]) and not FULL.owns(ALICE, public["bob"])


def test_hkdf_rfc_5869_case_1():
    key = FULL.derive(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert key.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


@pytest.mark.parametrize("point", LOW_ORDER, ids=range(7))
def test_a_point_of_low_order_is_no_key(point):
    with pytest.raises(Tampered, match="client 3 offers a key of low order"):
        FULL.agree(ALICE, {2: FULL.public_key(BOB), 3: point}, b"", b"")


def test_every_bit_of_a_box_counts():
    key = os.urandom(32)
    box = FULL.seal(key, TEXT, b"context")
    assert len(box) == BOX_BYTES and FULL.open(key, box, b"context") == TEXT
    for bit in range(8 * len(box)):
        flipped = bytearray(box)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Tampered):
            FULL.open(key, bytes(flipped), b"context")


def test_a_box_opens_for_its_pair_direction_and_session_only():
    key, sid, other = os.urandom(32), os.urandom(32), os.urandom(32)
    box = FULL.seal(key, TEXT, box_context(sid, 1, 2))
    assert FULL.open(key, box, box_context(sid, 1, 2)) == TEXT
    for context in (box_context(sid, 2, 1), box_context(sid, 1, 3), box_context(other, 1, 2)):
        with pytest.raises(Tampered):
            FULL.open(key, box, context)
    for cut in (b"", box[:-1], box + b"\0"):
        with pytest.raises(Tampered, match="another length"):
            FULL.open(key, cut, box_context(sid, 1, 2))


def test_nothing_is_sealed_twice_alike():
    key = os.urandom(32)
    assert len({FULL.seal(key, TEXT, b"") for _ in range(100)}) == 100
    assert len({FULL.private_key() for _ in range(100)}) == 100


def test_a_signature_is_of_one_key_and_one_text():
    signature = FULL.sign(ALICE, b"text")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    # RFC 8032, section 7.1, test 1: the empty message
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    expected = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert FULL.sign(secret, b"").hex() == expected
    assert FULL.signed(public, bytes.fromhex(expected), b"")
    assert not FULL.signed(public, bytes.fromhex(expected), b"x")
    assert not FULL.signed(public, signature, b"text")
    assert not FULL.signed(b"", signature, b"text")


def test_a_commitment_is_to_one_seed_of_one_client_in_one_session():
    sids, seeds = [os.urandom(32) for _ in range(2)], [os.urandom(32) for _ in range(2)]
    assert len({FULL.commit(sid, client, seed) for sid in sids for client in (1, 2) for seed in seeds}) == 8
    assert FULL.commit(sids[0], 1, seeds[0]) == FULL.commit(sids[0], 1, seeds[0])


@pytest.mark.slow
def test_no_two_pairs_get_seeds_with_the_same_beginning(full):
    clients = 1415 if full else 150  # 1,000,405 or 11,175 pairs
    private = [FULL.private_key() for _ in range(clients)]
    public = [FULL.public_key(key) for key in private]
    seen = set()
    for u, key in enumerate(private):
        seen.update(seed[:8] for seed in FULL.agree(key, dict(enumerate(public[:u])), b"sid", b"purpose").values())
    assert len(seen) == clients * (clients - 1) // 2


def test_the_ideal_ones_have_the_same_sizes():
    ideal = PRIMITIVES["ideal"]
    for primitives in (FULL, ideal):
        private = primitives.private_key()
        assert len(private) == len(primitives.public_key(private)) == 32
        assert primitives.owns(private, primitives.public_key(private))
        public = primitives.public_key(primitives.private_key())
        assert [len(key) for key in primitives.agree(private, {7: public}, b"", b"").values()] == [32]
        assert len(primitives.derive(private, b"", b"")) == 32
        box = primitives.seal(private, TEXT, b"")
        assert len(box) == BOX_BYTES and len(primitives.open(private, box, b"")) == 66
        shares = primitives.share(private, 2, [3, 4, 5])
        assert [len(share) for share in shares] == [33] * 3
        assert len(primitives.recover(Reconstruction(2), dict(zip([3, 4, 5], shares, strict=True)))) == 32
        assert len(primitives.commit(b"", 3, private)) == 32
        assert len(primitives.sign(private, b"")) == 64
    assert ideal.signed(b"", b"", b"") and ideal.masks(32, [b""], [b""]).added == ()
