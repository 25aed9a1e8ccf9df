"""Vectors without the coordinates that a rule freezes, and back. Legend: P parameters, N of them live."""

from collections.abc import Mapping

from strategies.core.protocol import Mask, Vector


def without_frozen(vectors: Mapping[str, Vector], live: Mapping[str, Mask]) -> dict[str, Vector]:
    """Each vector's live coordinates (N,); whole where `live` has no mask of its name."""
    return {name: vector[live[name]] if name in live else vector for name, vector in vectors.items()}


def with_frozen(vectors: Mapping[str, Vector], live: Mapping[str, Mask]) -> dict[str, Vector]:
    """The vectors (P,) that `without_frozen` shortened, with zeros in the frozen coordinates."""
    return {name: _spread(vector, live[name]) if name in live else vector for name, vector in vectors.items()}


def _spread(vector_N: Vector, live: Mask) -> Vector:
    whole = vector_N.new_zeros(len(live))
    whole[live] = vector_N
    return whole
