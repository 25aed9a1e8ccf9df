"""The server's part of a round on one shard of the model: noise, transforms in reverse, the rule."""

from collections.abc import Mapping

import torch

from engine.aggregation.ring_encoding import noise, sent_length
from engine.config.federation import Federation
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Mask, ServerState
from strategies.privacy.central import CentralPlan
from strategies.transforms.chain import decode


def server_step(
    state: ServerState,
    aggregate: Aggregate | None,
    plan: CentralPlan | None,
    clip: float,
    federation: Federation,
    layout: Layout,
    sent_masks: Mapping[str, Mask],
    rank: int = 0,
) -> tuple[ServerState, float]:
    """Returns the next state of a shard and the next clipping norm; there must be an aggregate or a plan (`noisy`)."""
    if plan is not None:
        aggregate, clip = noisy(aggregate, plan, clip, federation, layout, state.round, sent_masks, rank)
    assert aggregate is not None, "without sums and without noise the model stays as it is"
    aggregate, state = decode(federation.transforms, aggregate, state)
    return federation.strategy.apply(state, aggregate), clip


def noisy(
    aggregate: Aggregate | None,
    plan: CentralPlan,
    clip: float,
    federation: Federation,
    layout: Layout,
    round_: int,
    sent_masks: Mapping[str, Mask],
    rank: int = 0,
) -> tuple[Aggregate, float]:
    """Returns the sums with the server's noise, and the next clipping norm; without clients the sums are noise alone.

    `layout` and the `sent_masks` are those of the shard's vectors, and each `rank` draws noise of its own.
    """
    if aggregate is None:
        lengths = {**federation.strategy.beside(layout), **plan.beside}
        extras = {name: torch.zeros(length) for name, length in lengths.items()}
        aggregate = Aggregate(0.0, torch.zeros(sent_length(federation, layout)), extras, 0)
    return plan.decode(aggregate, clip, noise(federation, round_, -1 - rank), sent_masks)
