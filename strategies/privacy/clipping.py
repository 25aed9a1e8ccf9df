"""The bound on a client's part in all sums of a round: a weight of at most 1 and one norm for everything it sends."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from strategies.core.errors import StrategyError
from strategies.core.protocol import Update, Vector

MARGIN = 2.0**-22  # float32 rounds each product up by less: the clipped norm is at most the bound, not about it


@dataclass(frozen=True)
class Contribution:
    """The recipe keys on how a client's part is bounded.

    `joint`: extras are clipped together with delta, as one long vector, and get the same noise; without it clients may
    send delta only.
    """

    joint: bool = False


def bounded(
    update: Update,
    clip: float,
    joint: bool,
    whole_norm: Callable[[float], float] = float,
) -> tuple[Update, float]:
    """The update with |(delta, extras)| <= clip, and the norm that it had before.

    `whole_norm` is that of `Broadcast`, since the update may be a shard.

    With a weight from 0 to 1 the client moves the sums of weight * delta and of extras by at most `clip`, together.
    StrategyError for extras that are not clipped and for other weights: to cut a weight would not cut the extras that
    the rule has built with it. ValueError for NaN and infinity.
    """
    if update.extras and not joint:
        raise StrategyError(
            f"client {update.client} sends {sorted(update.extras)} beside its delta, which nothing clips"
        )
    if not 0 <= update.weight <= 1:
        raise StrategyError(
            f"client {update.client} has the weight {update.weight}, and clipping needs one from 0 to 1"
        )
    norm = whole_norm(norm_of(update.delta, update.extras))
    if not math.isfinite(norm):
        raise ValueError(f"the update of client {update.client} holds NaN or infinity")
    if norm <= clip:
        return update, norm
    factor = clip / norm * (1 - MARGIN)
    extras = {name: extra * factor for name, extra in update.extras.items()}
    return replace(update, delta=update.delta * factor, extras=extras), norm


def norm_of(delta: Vector, extras: Mapping[str, Vector]) -> float:
    """The L2 norm of delta and extras as one vector."""
    parts = [delta, *extras.values()]
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))
