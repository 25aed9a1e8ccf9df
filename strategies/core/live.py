"""Vectors without the coordinates that a rule freezes, and back. Legend: P parameters, N of them live."""

from collections.abc import Mapping

from strategies.core.protocol import Mask, Vector


def without_frozen(vectors: Mapping[str, Vector], live: Mapping[str, Mask]) -> dict[str, Vector]:
    """Each vector's live coordinates (N,); whole where `live` has no mask of its name."""
    return {name: vector[live[name]] if name in live else vector for name, vector in vectors.items()}


def with_frozen(vectors: Mapping[str, Vector], live: Mapping[str, Mask]) -> dict[str, Vector]:
    """The vectors (P,) that `without_frozen` shortened, with zeros in the frozen coordinates."""
    zeros = {name: vectors[name].new_zeros(len(mask)) for name, mask in live.items() if name in vectors}
    return {**vectors, **{name: whole.masked_scatter_(live[name], vectors[name]) for name, whole in zeros.items()}}
