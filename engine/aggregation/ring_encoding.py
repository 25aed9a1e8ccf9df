"""What a ring vector of secure aggregation holds: the update, the sums beside it, and the client's figures."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from engine.config.federation import Federation
from engine.objectives.figures import figure_bounds
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Mask, Size, Update, with_frozen, without_frozen
from strategies.core.seeds import rng
from strategies.privacy.checks import NoisePlan
from strategies.privacy.distributed import DistributedPlan
from strategies.privacy.integers import signs
from strategies.privacy.noise import Words, byte_words, seeded_words
from strategies.secagg.ring import Sum, Sums, Totals

NOISY = "noisy"  # the sum of everything under distributed noise
FIGURE = "figure: "  # begins the names of sums of what training measures, such as the loss's terms
CLIPPED = "clipped"


def ring_sums(
    federation: Federation, layout: Layout, plan: NoisePlan | None, clip: float, clients: int, tokens: int, round_: int
) -> Sums:
    """Returns the sums of a session of `clients`, none of which trains on more than `tokens` tokens."""
    secagg, lengths = federation.privacy.secagg, sent_lengths_of(federation, layout, round_)
    if plan is not None and plan.adds_to == "ring":
        sums = [Sum(NOISY, plan.ring.dimension, plan.ring.bound, "noisy")]
    else:
        central = plan if plan is not None and plan.adds_to == "sum" else None
        sums = [Sum("delta", lengths["delta"], min(secagg.bound, clip) if central else secagg.bound, "weighted")]
        sums += [Sum(name, length, secagg.bounds[name]) for name, length in lengths.items() if name != "delta"]
        sums += [Sum(name, length, 0.5) for name, length in (central.beside if central else {}).items()]
    bounds = {**figure_bounds(federation.train.objective, tokens), CLIPPED: max(1, sum(lengths.values()))}
    figures = (Sum(FIGURE + name, 1, bound) for name, bound in bounds.items())
    return secagg.sums((*sums, *figures), clients)


def rounding(sums: Sums) -> float:
    """Returns what rounding may add to the L2 norm of a client's vector: below one ring step for each coordinate."""
    vectors = (entry for entry in sums.sums if not entry.name.startswith(FIGURE))
    return math.sqrt(sum(entry.length / sums.scale(entry.name) ** 2 for entry in vectors))


def ring_values(
    update: Update, sums: Sums, federation: Federation, plan: NoisePlan | None, round_: int, masks: Mapping[str, Mask]
) -> tuple[dict[str, np.ndarray], int]:
    """Returns a client's values by sum, without figures, and how many a bound clips; `masks` say what is sent."""
    values = without_frozen({"delta": update.delta, **update.extras}, masks)
    if plan is not None and plan.adds_to == "ring":
        words, extras = noise(federation, round_, update.client), {name: values[name] for name in update.extras}
        plan = replace(plan, length=sum(map(len, values.values())))
        short = replace(update, delta=values["delta"], extras=extras)
        return {NOISY: plan.encode(short, _signs(federation, plan, round_), words)}, 0
    limits = {entry.name: entry.bound for entry in sums.sums}
    clipped = sum(int((value.abs() > limits[name]).sum()) for name, value in values.items())
    return {name: value.numpy() for name, value in values.items()}, clipped


def ring_aggregate(
    totals: Totals, federation: Federation, layout: Layout, plan: NoisePlan | None, round_: int
) -> tuple[Aggregate, dict[str, float]]:
    """Returns what the server learns: the sums as floats, and the figures by name."""
    sums = totals.sums
    figures = {name.removeprefix(FIGURE): float(sums[name][0]) for name in sums if name.startswith(FIGURE)}
    sent_masks = sent_masks_of(federation, layout, round_)
    if plan is not None and plan.adds_to == "ring":
        lengths = sent_lengths_of(federation, layout, round_)
        plan = replace(plan, length=sum(lengths.values()))
        del lengths["delta"]
        short = plan.decode(sums[NOISY], totals.count, lengths, _signs(federation, plan, round_))
        vectors = with_frozen({"delta": short.total, **short.extras}, sent_masks)
        return replace(short, total=vectors.pop("delta"), extras=vectors), figures
    names = (name for name in sums if not name.startswith(FIGURE))
    vectors = with_frozen({name: torch.from_numpy(sums[name].astype(np.float32)) for name in names}, sent_masks)
    return Aggregate(totals.weight, vectors.pop("delta"), vectors, totals.count), figures


def sent_masks_of(federation: Federation, layout: Layout, round_: int) -> dict[str, Mask]:
    """Returns the strategy's masks of a round for what travels: a delta that a transform shortens has none."""
    masks, unshortened = federation.strategy.sent_masks(round_, layout), sent_length(federation, layout) == layout.size
    return {name: mask for name, mask in masks.items() if unshortened or name != "delta"}


def sent_lengths_of(federation: Federation, layout: Layout, round_: int) -> dict[str, int]:
    """Returns how many coordinates of the delta and of each sum beside it are sent in a round."""
    lengths = {"delta": sent_length(federation, layout), **federation.strategy.beside(layout)}
    return lengths | {name: int(mask.sum()) for name, mask in sent_masks_of(federation, layout, round_).items()}


def sent_length(federation: Federation, layout: Layout) -> int:
    """Returns the length of a client's delta after all transforms."""
    size = Size(layout.size, layout.size)
    for transform in federation.transforms:
        size = transform.size(size)
    return size.length


def _signs(federation: Federation, plan: DistributedPlan, round_: int) -> np.ndarray:
    """Returns the signs (D,) of the round's random rotation to D coordinates, the same for everybody."""
    return signs(rng(federation.seed, round_, -1, "rotation"), plan.ring.dimension)


def noise(federation: Federation, round_: int, client: int = -1) -> Words:
    """Returns the source of a client's (or the server's) noise: the seed, or under "full" the operating system."""
    if federation.privacy.simulated:
        return seeded_words(rng(federation.seed, round_, client, "noise"))
    return byte_words(os.urandom)
