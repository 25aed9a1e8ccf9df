import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from strategies.secagg.masks import PIECE, Masks

KEY = bytes(range(32))


def keystream(key, start, length):
    """Coordinates of one mask (length,)."""
    values = np.zeros(length, np.uint32)
    Masks(32, (key,)).apply(values, start)
    return values


def test_the_published_stream_of_the_zero_key():
    assert keystream(bytes(32), 0, 4).astype("<u4").tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_it_is_the_cipher_in_one_piece():
    length = 2 * PIECE + 5
    whole = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(4 * length))
    assert keystream(KEY, 0, length).astype("<u4").tobytes() == whole


@given(st.integers(0, 50), st.integers(0, 50))
def test_any_slice_is_masked_as_in_the_whole(start, length):
    np.testing.assert_array_equal(keystream(KEY, start, length), keystream(KEY, 0, 100)[start : start + length])


@pytest.mark.parametrize("start", [1, PIECE - 1, PIECE + 2])
def test_long_slices_too(start):
    whole = keystream(KEY, 0, 3 * PIECE)
    np.testing.assert_array_equal(keystream(KEY, start, len(whole) - start), whole[start:])


@pytest.mark.parametrize("bits", [8, 20, 32])
def test_signs_and_the_ring(bits):
    values = np.arange(10, dtype=np.uint32)
    Masks(bits, (KEY,), (bytes(32),)).apply(values)
    expected = (np.arange(10) + keystream(KEY, 0, 10).astype(int) - keystream(bytes(32), 0, 10)) % 2**bits
    np.testing.assert_array_equal(values, expected)
    Masks(bits, (bytes(32),), (KEY,)).apply(values)
    np.testing.assert_array_equal(values, np.arange(10))


def test_a_far_slice_uses_the_whole_counter():
    # coordinate 2^34 is in block 2^32, beyond a counter of 32 bits
    block = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor().update((2**32).to_bytes(16, "big"))
    assert keystream(KEY, 2**34, 4).astype("<u4").tobytes() == block


def test_masked_bytes_look_random():
    values = np.zeros(1 << 20, np.uint32)  # 4 MB
    Masks(32, (KEY,), (bytes(32),)).apply(values)
    counts = np.bincount(values.view(np.uint8), minlength=256)
    expected = values.nbytes / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: the cube root of a chi-square over its freedom is nearly normal
    z = ((chi_square / 255) ** (1 / 3) - (1 - 2 / (9 * 255))) / math.sqrt(2 / (9 * 255))
    assert math.erfc(abs(z) / math.sqrt(2)) > 1e-4


def test_keys_are_not_printed():
    assert KEY.hex() not in repr(Masks(32, (KEY,))) and repr(KEY) not in repr(Masks(32, (KEY,), (KEY,)))
