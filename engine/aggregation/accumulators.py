"""What takes clients' updates in a worker: the exact sum, the ring sum of secure aggregation, or each by itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine.aggregation.exact_sum import NonFiniteUpdate, finite_bound
from engine.aggregation.ring_encoding import CLIPPED, FIGURE, ring_values
from engine.aggregation.ring_shard import RingShard
from engine.config.federation import Federation
from engine.messages.reports import UpdateMessage
from engine.objectives.figures import client_figures
from strategies.core.errors import StrategyError
from strategies.core.protocol import Update
from strategies.core.seeds import rng
from strategies.privacy.checks import NoisePlan
from strategies.secagg.masks import Masks, wrap


class Accumulator(Protocol):
    """ExactSum, SingleUpdates, or RingSum, which is never emptied: a later session of its round masks the same sum."""

    def add(self, update: Update) -> None:
        """Adds one update; NonFiniteUpdate, and no change, where it cannot be used."""
        ...


@dataclass
class SingleUpdates:
    """Keeps each client's update for a rule that reads them, however large its values: they may be a liar's."""

    updates: dict[int, UpdateMessage] = field(default_factory=dict)

    def add(self, update: Update) -> None:
        """Copies the update; NonFiniteUpdate where it holds NaN or infinity."""
        finite_bound(update)
        self.updates[update.client] = UpdateMessage.of(update)

    def take(self) -> dict[int, UpdateMessage]:
        """Returns the updates by client since the last time, and forgets them."""
        updates, self.updates = self.updates, {}
        return updates


@dataclass
class RingSum:
    """Adds up clients' shards (S,) of the ring vector, which leave the process only under masks."""

    shard: RingShard
    federation: Federation
    plan: NoisePlan | None
    round: int
    summed: Callable[[float], float] = float  # of a figure over the worker's ranks

    def __post_init__(self) -> None:
        self.total_S = np.zeros(self.shard.length, np.uint32)

    def add(self, update: Update) -> None:
        """Adds one client; NonFiniteUpdate where values, weight or training loss have no place in the ring."""
        finite_bound(update)
        figures = client_figures(self.federation.train.objective, update.metrics)
        if not all(map(math.isfinite, figures.values())):
            raise NonFiniteUpdate("its training loss is no number")
        shard = self.shard
        try:
            shard.sums.encode_head(update.weight)
        except StrategyError as error:
            raise NonFiniteUpdate(str(error)) from error
        values, clipped = ring_values(update, shard.sums, self.federation, self.plan, self.round, shard.sent_masks_S)
        figures[CLIPPED] = self.summed(clipped)
        if shard.rank == 0:
            values |= {FIGURE + name: np.array([figure], np.float64) for name, figure in figures.items()}
        draws = rng(self.federation.seed, self.round, update.client, "rounding")
        shard.encode_into(self.total_S, values, update.weight, draws)

    def masked(self, masks: list[Masks]) -> np.ndarray:
        """Returns the sum (S,) under all these masks."""
        masked_S = self.total_S.copy()
        wrap(masked_S, self.shard.sums.bits)
        for mask in masks:
            self.shard.mask(masked_S, mask)
        return masked_S
