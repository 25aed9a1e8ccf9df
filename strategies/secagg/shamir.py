"""Shamir's secret sharing (1979) over the field of p = 2^256 + 297, the first prime above all 32-byte secrets.

Plain Python integers: they are faster here than a general library's field elements. A share is the value of a random
polynomial of degree t - 1 whose constant term is the secret; any t shares recover it, t - 1 say nothing about it.
"""

import secrets
from collections.abc import Mapping, Sequence
from itertools import accumulate

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: int, threshold: int, points: Sequence[int], prime: int = PRIME) -> list[int]:
    """The polynomial's value at each point; coefficients come from the operating system."""
    assert 0 <= secret < prime and 1 <= threshold <= len(points)
    assert len(set(points)) == len(points) and all(0 < x < prime for x in points)
    coefficients = [secrets.randbelow(prime) for _ in range(threshold - 1)]
    shares = []
    for x in points:
        y = 0
        for a in coefficients:
            y = (y + a) * x % prime
        shares.append((y + secret) % prime)
    return shares


def at_zero(points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Lagrange's weights: a polynomial's constant term is the sum of its values at the points times these."""
    tops, bottoms = [], []
    for i, x in enumerate(points):
        top = bottom = 1
        for j, z in enumerate(points):
            if i != j:
                top = top * z % prime
                bottom = bottom * (z - x) % prime
        tops.append(top)
        bottoms.append(bottom)
    return [top * inverse % prime for top, inverse in zip(tops, _inverses(bottoms, prime), strict=True)]


def _inverses(values: Sequence[int], prime: int) -> list[int]:
    """All inverses by a single inversion: products from the left, then divided out from the right (Montgomery 1987)."""
    products = list(accumulate(values, lambda product, value: product * value % prime, initial=1))
    rest = pow(products[-1], -1, prime)
    inverses = []
    for i in range(len(values) - 1, -1, -1):
        inverses.append(rest * products[i] % prime)
        rest = rest * values[i] % prime
    return inverses[::-1]


def combine(shares: Sequence[int], weights: Sequence[int], prime: int = PRIME) -> int:
    """The secret from at least t shares and the weights of their points."""
    return sum(share * weight for share, weight in zip(shares, weights, strict=True)) % prime


def share(secret: bytes, threshold: int, clients: Sequence[int]) -> list[bytes]:
    """Each client's share of a 32-byte secret, 33 bytes; client u's point is u + 1, since the secret itself is at 0."""
    assert len(secret) == SECRET_BYTES
    points = [client + 1 for client in clients]
    return [y.to_bytes(SHARE_BYTES, "big") for y in split(int.from_bytes(secret, "big"), threshold, points)]


def well_formed(text: bytes) -> bool:
    """Whether these bytes can be a share."""
    return len(text) == SHARE_BYTES and int.from_bytes(text, "big") < PRIME


class Reconstruction:
    """Recovers many secrets with threshold t; the weights of a set of holders are computed once for all of them."""

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self._weights: dict[tuple[int, ...], list[int]] = {}

    def secret(self, shares: Mapping[int, bytes]) -> bytes | None:
        """The secret from the shares by holder, of which the first t are used; None if they give no 32-byte secret."""
        assert len(shares) >= self.threshold
        holders = tuple(sorted(shares)[: self.threshold])
        if holders not in self._weights:
            self._weights[holders] = at_zero([holder + 1 for holder in holders])
        secret = combine([int.from_bytes(shares[holder], "big") for holder in holders], self._weights[holders])
        return secret.to_bytes(SECRET_BYTES, "big") if secret < 2 ** (8 * SECRET_BYTES) else None
