"""What the state machines need of cryptography: real in mode "full", of the same size but empty in "ideal".

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), AES-256-GCM (NIST SP 800-38D) and Ed25519 (RFC 8032) are those of the
`cryptography` package. All keys, seeds and nonces come from the operating system, never from the experiment's seed.
"""

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Literal

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from strategies.secagg import shamir
from strategies.secagg.masks import Masks
from strategies.secagg.shamir import SECRET_BYTES, SHARE_BYTES

KEY_BYTES = 32
HASH_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
SIGNATURE_BYTES = 64
BOX_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES  # a share of each of two secrets

Mode = Literal["ideal", "full"]


class Tampered(Exception):
    """Something that others sent is not what its author made."""


class Primitives:
    """Real cryptography; all of `bytes`, keys as they are on the wire."""

    def private_key(self) -> bytes:
        """32 random bytes, which X25519 clamps itself."""
        return os.urandom(KEY_BYTES)

    def public_key(self, private: bytes) -> bytes:
        """X25519's public key."""
        return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    def owns(self, private: bytes, public: bytes) -> bool:
        """Whether the two belong together."""
        return self.public_key(private) == public

    def agree(self, private: bytes, public: Mapping[int, bytes], salt: bytes, purpose: bytes) -> dict[int, bytes]:
        """The key in common with each client: HKDF of X25519. Tampered for a point of low order, which gives zeros."""
        mine = X25519PrivateKey.from_private_bytes(private)  # as slow as an exchange, so once for all
        keys = {}
        for client, theirs in public.items():
            try:
                secret = mine.exchange(X25519PublicKey.from_public_bytes(theirs))
            except ValueError:
                raise Tampered(f"client {client} offers a key of low order") from None
            keys[client] = self.derive(secret, salt, purpose)
        return keys

    def derive(self, secret: bytes, salt: bytes, purpose: bytes) -> bytes:
        """A key from a secret: HKDF-SHA256."""
        return HKDF(SHA256(), KEY_BYTES, salt, purpose).derive(secret)

    def seal(self, key: bytes, text: bytes, context: bytes) -> bytes:
        """The text encrypted and bound to its context: AES-256-GCM with a random nonce in front."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + AESGCM(key).encrypt(nonce, text, context)

    def open(self, key: bytes, box: bytes, context: bytes) -> bytes:
        """The text of a box; Tampered if it is not as it was sealed, or not of the one length that boxes have."""
        if len(box) != BOX_BYTES:
            raise Tampered("a box of another length")
        try:
            return AESGCM(key).decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], context)
        except InvalidTag:
            raise Tampered("a box that its sender did not seal") from None

    def share(self, secret: bytes, threshold: int, clients: Sequence[int]) -> list[bytes]:
        """Each client's share of a secret: Shamir's."""
        return shamir.share(secret, threshold, clients)

    def recover(self, reconstruction: shamir.Reconstruction, shares: Mapping[int, bytes]) -> bytes | None:
        """The secret from enough shares by holder; None if they are no shares of a secret."""
        return reconstruction.secret(shares) if all(map(shamir.well_formed, shares.values())) else None

    def masks(self, bits: int, added: Sequence[bytes], subtracted: Sequence[bytes]) -> Masks:
        """The masks of these keys."""
        return Masks(bits, tuple(added), tuple(subtracted))

    def commit(self, sid: bytes, client: int, seed: bytes) -> bytes:
        """A commitment to a seed, a hash: the seed has 256 random bits, so nothing else needs to hide it."""
        return sha256(b"fedpost secagg seed" + sid + client.to_bytes(8, "big") + seed).digest()

    def sign(self, private: bytes, text: bytes) -> bytes:
        """A client's Ed25519 signature."""
        return Ed25519PrivateKey.from_private_bytes(private).sign(text)

    def signed(self, public: bytes, signature: bytes, text: bytes) -> bool:
        """Whether the owner of the identity key has signed this text."""
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
        except (InvalidSignature, ValueError):
            return False
        return True


class _Ideal(Primitives):
    """Stand-ins that hide nothing: messages have the same sizes, and drop-outs abort a session under the same rules.

    Public keys are random, since a session refuses two that are the same.
    """

    def public_key(self, private: bytes) -> bytes:
        return private

    def agree(self, private: bytes, public: Mapping[int, bytes], salt: bytes, purpose: bytes) -> dict[int, bytes]:
        return dict.fromkeys(public, bytes(KEY_BYTES))

    def derive(self, secret: bytes, salt: bytes, purpose: bytes) -> bytes:
        return bytes(KEY_BYTES)

    def owns(self, private: bytes, public: bytes) -> bool:
        return True

    def seal(self, key: bytes, text: bytes, context: bytes) -> bytes:
        return bytes(BOX_BYTES)

    def open(self, key: bytes, box: bytes, context: bytes) -> bytes:
        return bytes(2 * SHARE_BYTES)

    def share(self, secret: bytes, threshold: int, clients: Sequence[int]) -> list[bytes]:
        return [bytes(SHARE_BYTES)] * len(clients)

    def recover(self, reconstruction: shamir.Reconstruction, shares: Mapping[int, bytes]) -> bytes | None:
        return bytes(SECRET_BYTES)

    def masks(self, bits: int, added: Sequence[bytes], subtracted: Sequence[bytes]) -> Masks:
        return Masks(bits)

    def commit(self, sid: bytes, client: int, seed: bytes) -> bytes:
        return bytes(HASH_BYTES)

    def sign(self, private: bytes, text: bytes) -> bytes:
        return bytes(SIGNATURE_BYTES)

    def signed(self, public: bytes, signature: bytes, text: bytes) -> bool:
        return True


PRIMITIVES: dict[Mode, Primitives] = {"full": Primitives(), "ideal": _Ideal()}
