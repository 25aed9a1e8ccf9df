"""Secure aggregation in a gang: its ranks are one client, each masks its own shard at its place of the keystream.

The first rank plays the protocol for the gang's clients and holds their secrets; the masks of a client, which its ranks
share, are all that the others get.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.client import DOWN
from engine.ring import figures_of
from engine.ring_shard import RingShard
from engine.secure import SecureClients
from engine.settings import Federation
from engine.sums import PartialSum, merge
from engine.wire import Report, Sent, WireAggregate, aggregate_from_wire
from strategies.partition import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.messages import Inbox, MaskedSum
from strategies.secagg.ring import Sums
from strategies.types import Aggregate, Update


class SecureRank:
    """A rank's part: its shards of its clients' vectors, added up, then masked."""

    federation: Federation
    rank: int
    ring: RingShard
    masked_S: np.ndarray

    def clear_own(self, sums: Sums, partition: Partition) -> None:
        """Nobody has been added yet."""
        self.ring = RingShard(sums, partition, self.rank)

    def secure_own(self, client: int, sent: Sent) -> tuple[Report, float | None]:
        """What this rank does in training a client and adding it up; the first rank's report, and the weight."""
        report, update = self.trained(client, sent)
        report = replace(report, metrics={DOWN: report.metrics[DOWN]})
        if update is None:
            return report, None
        if not math.isfinite(update.metrics["loss"]):
            return replace(report, failed="its training loss is no number"), None
        clipped = int(self.summed(self.ring.beyond(update)))
        self.ring.add(update, figures_of(update, clipped), self.federation, sent.round)
        return report, update.weight

    def mask_own(self, masks: list[Masks]) -> None:
        """Masks this rank's shard, and keeps it until the driver asks for it."""
        self.masked_S = self.ring.masked(masks)

    def masked_shard(self) -> tuple[bool, np.ndarray]:
        """That it is there, and the masked shard, which stays in the store."""
        return True, self.masked_S

    def unmask_own(
        self, sums: Sums, removals: Masks, count: int, weight: float, *masked: np.ndarray
    ) -> tuple[dict[str, float], WireAggregate]:
        """The server's part for this rank's shard of all slots' masked vectors: figures, and the sums in the store."""
        return RingShard(sums, self.ring.partition, self.rank).unmasked(list(masked), removals, count, weight)

    def trained(self, client: int, sent: Sent) -> tuple[Report, Update | None]:
        """Trains a client: its report, and its shard of the update."""
        raise NotImplementedError

    def summed(self, value: float) -> float:
        """The sum over all ranks."""
        raise NotImplementedError


class SecureGang(SecureClients):
    """The first rank's part: the protocol."""

    partition: Partition

    def masked(self, inboxes: dict[int, Inbox], sent: Sent) -> tuple[list[Report], MaskedSum]:
        """Third trip: trains, and gives the masked head; the reports tell no figures."""

        def train(client: int, sums: Sums) -> tuple[Report, np.ndarray | None]:
            report, weight = self.everywhere("secure_own", client, sent)
            return report, None if weight is None else sums.encode_head(weight)

        return self.mask(inboxes, train)

    def _clear(self, sums: Sums) -> None:
        self._total_L = np.zeros(len(sums.encode_head(1.0)), np.uint32)
        self.everywhere("clear_own", sums, self.partition)

    def _masked(self, masks: list[Masks], bits: int) -> np.ndarray:
        self.everywhere("mask_own", masks)
        return super()._masked(masks, bits)

    def everywhere(self, method: str, *arguments: Any) -> Any:
        """What the first rank answers when all do the same."""
        raise NotImplementedError


def aggregate_of(sums: Sequence[PartialSum | WireAggregate]) -> Aggregate | None:
    """A shard of the sum over all slots: exact parts, or one that secure aggregation has unmasked; None of nobody."""
    parts = [one for one in sums if isinstance(one, PartialSum)]
    secured = [one for one in sums if isinstance(one, WireAggregate)]
    return aggregate_from_wire(secured[0]) if secured else merge(parts) if parts else None
