"""What bounds one client's part in all sums of a round: a cap on its weight and one norm for everything it sends."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from strategies.types import Update, Vector

MARGIN = 2.0**-22  # float32 rounds each product up by less: the clipped norm is at most the bound, not about it


@dataclass(frozen=True)
class Contribution:
    """How a client's part is bounded; recipe keys of the privacy section.

    `weight_cap` W: the weight becomes min(w, W) / W, also that of extras; unset, all weights must be 1. `joint`: extras
    are clipped together with delta, as one long vector, and get the same noise; without it nothing but delta may be
    sent.
    """

    weight_cap: float | None = None
    joint: bool = False

    def __post_init__(self) -> None:
        if self.weight_cap is not None and not 0 < self.weight_cap < math.inf:
            raise ValueError(f"privacy.dp.weight_cap must be a number above 0, not {self.weight_cap}")


def bounded(
    update: Update,
    clip: float,
    weight_cap: float | None,
    joint: bool,
    whole_norm: Callable[[float], float] = float,
) -> tuple[Update, float]:
    """The update with weight <= 1 and |(delta, extras)| <= clip, and the norm that it had before.

    `whole_norm` is that of Broadcast: the update may be a shard.

    With weights of at most 1 the client moves the sums of weight * delta and of extras by at most `clip`, together.
    ValueError for what would not be bounded.
    """
    if weight_cap is None and update.weight != 1:
        raise ValueError(f"client {update.client} has a weight other than 1, but without a cap all must be 1")
    if update.extras and not joint:
        raise ValueError(f"client {update.client} sends {sorted(update.extras)} beside its delta, which nothing clips")
    if not 0 <= update.weight < math.inf:
        raise ValueError(f"client {update.client} has no finite weight of at least 0")
    weight = update.weight if weight_cap is None else min(update.weight, weight_cap) / weight_cap
    # Extras are weighted already: by as much as the cap changes the weight, it changes them.
    ratio = weight / update.weight if update.weight else 0.0
    update = replace(update, weight=weight, extras={name: extra * ratio for name, extra in update.extras.items()})
    norm = whole_norm(norm_of(update.delta, update.extras))
    if not math.isfinite(norm):
        raise ValueError(f"the update of client {update.client} holds NaN or infinity")
    if norm <= clip:
        return update, norm
    factor = clip / norm * (1 - MARGIN)
    extras = {name: extra * factor for name, extra in update.extras.items()}
    return replace(update, delta=update.delta * factor, extras=extras), norm


def norm_of(delta: Vector, extras: Mapping[str, Vector]) -> float:
    """The L2 norm of all of it as one vector."""
    parts = [delta, *extras.values()]
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))
