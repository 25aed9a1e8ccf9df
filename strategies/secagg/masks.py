"""Masks: keystreams that are added to a ring vector and cancel in the sum. Legend: L coordinates.

A keystream is AES-256 in counter mode (NIST SP 800-38A) from counter zero, read as little-endian uint32. Coordinate i
is bytes 4 i to 4 i + 3 of it, so any slice can be masked alone: a rank masks its own shard. Every key masks one vector
of one session, which is what makes the fixed counter safe.
"""

from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PIECE = 32_768  # coordinates at a time: 128 KiB of keystream stay in the cache until they are added
WORDS = 4  # uint32 in an AES block

_ZEROS = memoryview(bytes(4 * (PIECE + WORDS)))


@dataclass(frozen=True)
class Masks:
    """Keys of masks, with their signs, for a ring of `bits`: they stay with their client. Mode "ideal" has none."""

    bits: int
    added: tuple[bytes, ...] = field(default=(), repr=False)
    subtracted: tuple[bytes, ...] = field(default=(), repr=False)

    def apply(self, values_L: np.ndarray, start: int = 0) -> None:
        """Masks a slice of the vector, which begins at coordinate `start`, in place and modulo 2^b."""
        assert values_L.dtype == np.uint32 and values_L.flags.c_contiguous
        block, skip = divmod(start, WORDS)
        counter = modes.CTR(block.to_bytes(16, "big"))
        keys = [*((key, np.add) for key in self.added), *((key, np.subtract) for key in self.subtracted)]
        streams = [(Cipher(algorithms.AES(key), counter).encryptor(), put) for key, put in keys]
        words = np.empty(PIECE + WORDS, "<u4")
        view = words.data.cast("B")
        for at in range(0, len(values_L), PIECE):
            piece = values_L[at : at + PIECE]
            before = skip if at == 0 else 0  # only the first block may begin before the slice
            size = 4 * (before + len(piece))
            for stream, put in streams:
                stream.update_into(_ZEROS[:size], view[:size])
                put(piece, words[before : before + len(piece)], out=piece)
            wrap(piece, self.bits)


def wrap(values_L: np.ndarray, bits: int) -> None:
    """Reduces uint32 modulo 2^bits in place."""
    if bits < 32:
        values_L &= np.uint32(2**bits - 1)
