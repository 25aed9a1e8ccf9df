"""The source of a run's random draws, except for noise under `full`; a store's build draws in store/build.py."""

from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch

Purpose = (
    Literal["cohort", "availability", "rank", "batches", "personal", "dropout", "initial", "evaluate", "sample", "kl"]
    | Literal["encode", "decode", "projection", "adapters", "sketch", "rounding", "rotation", "noise"]
    | Literal["candidates", "generations", "directions", "probe"]
)


class _Key(np.random.bit_generator.ISeedSequence):
    """A seed sequence that is the key itself; given a `key`, NumPy would ask the system for entropy and not use it."""

    def __init__(self, digest: bytes) -> None:
        self.words = np.frombuffer(digest[:16], "<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Philox asks for its key: two words of 64 bits."""
        assert n_words == 2 and dtype == np.uint64
        return self.words


def rng(seed: int, round_: int, client: int, purpose: Purpose) -> np.random.Generator:
    """A counter-based generator (Philox) with the same stream on every machine; client -1 means no client."""
    return keyed_rng(sha256(f"fedpost/{seed}/{round_}/{client}/{purpose}".encode()).digest())


def keyed_rng(digest: bytes) -> np.random.Generator:
    """The generator (Philox) whose key is the first 16 bytes of a digest."""
    # NumPy takes any ISeedSequence, but its type hints allow only one.
    return np.random.Generator(np.random.Philox(_Key(digest)))  # type: ignore[arg-type]


def sample_key(seed: int, round_: int, client: int, visit: int, row: int, sample: int) -> bytes:
    """The key of the draws for one completion: of a client's row, at its visit of a round, the sample of a number."""
    return sha256(f"fedpost/{seed}/{round_}/{client}/rollout/{visit}/{row}/{sample}".encode()).digest()


def torch_seed(seed: int, round_: int, client: int, purpose: Purpose) -> int:
    """A seed for `seed_torch`, where torch itself must draw (dropout, a model's initial weights)."""
    return int(rng(seed, round_, client, purpose).integers(2**63))


def seed_torch(seed: int) -> None:
    """As `torch.manual_seed`, which would also keep every call and its stack for devices that are not in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def torch_rng(seed: int, round_: int, client: int, purpose: Purpose) -> torch.Generator:
    """A CPU generator of torch on the stream of `rng`."""
    return torch.Generator().manual_seed(torch_seed(seed, round_, client, purpose))
