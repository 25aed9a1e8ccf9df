"""What takes clients' updates in a worker: the exact sum, the ring sum of secure aggregation, or each by itself.

Legend: P parameters, S coordinates of a shard of the ring vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine.aggregation.exact_sum import NonFiniteUpdate, finite_bound
from engine.aggregation.ring_encoding import Plan, figures_of, ring_values
from engine.aggregation.ring_shard import RingShard
from engine.config.federation import Federation
from engine.messages.reports import UpdateMessage
from engine.objectives.base import client_figures
from strategies.core.errors import StrategyError
from strategies.core.layout import Layout
from strategies.core.protocol import Update
from strategies.core.seeds import rng
from strategies.secagg.masks import Masks, wrap


class Accumulator(Protocol):
    """Takes updates one after another; see ExactSum, SingleUpdates and RingSum."""

    def add(self, update: Update) -> None:
        """Takes one update; NonFiniteUpdate, and no change, where it cannot be used."""
        ...


@dataclass
class SingleUpdates:
    """Keeps each client's update for a rule that reads them.

    Values may be as large as they like: a liar's are for the rule to survive.
    """

    updates: dict[int, UpdateMessage] = field(default_factory=dict)

    def add(self, update: Update) -> None:
        """Copies the update; NonFiniteUpdate where it holds NaN or infinity."""
        finite_bound(update)
        self.updates[update.client] = UpdateMessage.of(update)


class RingSum:
    """Adds up clients' ring vectors, or a rank's shards of them, which leave the process only under masks.

    `summed` adds a figure up over the worker's ranks.
    """

    def __init__(
        self,
        shard: RingShard,
        federation: Federation,
        layout: Layout,
        plan: Plan,
        round_: int,
        summed: Callable[[float], float] = float,
    ) -> None:
        self.shard, self.federation, self.layout, self.plan = shard, federation, layout, plan
        self.round, self.summed = round_, summed
        self.total_S = np.zeros(shard.length, np.uint32)

    def add(self, update: Update) -> None:
        """Adds one client; NonFiniteUpdate where values, weight or training loss have no place in the ring."""
        finite_bound(update)
        objective = self.federation.train.objective
        if not all(map(math.isfinite, client_figures(objective, update.metrics).values())):
            raise NonFiniteUpdate("its training loss is no number")
        try:
            self.shard.sums.encode_head(update.weight)
        except StrategyError as error:
            raise NonFiniteUpdate(str(error)) from error
        shard = self.shard
        values, clipped = ring_values(
            update, shard.sums, self.federation, self.layout, self.plan, self.round, shard.live_S
        )
        figures = figures_of(update, objective, int(self.summed(clipped)))
        if shard.rank == 0:
            values |= {name: np.array([figure], np.float64) for name, figure in figures.items()}
        draws = rng(self.federation.seed, self.round, update.client, "rounding")
        shard.encode_into(self.total_S, values, update.weight, draws)

    def masked(self, masks: list[Masks]) -> np.ndarray:
        """Returns the sum (S,) under all these masks."""
        masked_S = self.total_S.copy()
        wrap(masked_S, self.shard.sums.bits)
        for mask in masks:
            self.shard.mask(masked_S, mask)
        return masked_S
