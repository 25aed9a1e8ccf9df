"""Secure aggregation in a gang: its ranks are one client, each masks its own shard at its place of the keystream.

The first rank plays the protocol for the gang's clients and holds their secrets; the masks of a client, which its ranks
share, are all that the others get.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist

from engine.aggregation.exact_sum import PartialSum, merge
from engine.aggregation.ring_encoding import figures_of, live_masks
from engine.aggregation.ring_shard import RingShard
from engine.aggregation.secure_clients import SecureClients
from engine.config.federation import Federation
from engine.messages.tasks import Unit
from engine.messages.wire import DOWN, Report, Sent, WireAggregate, aggregate_from_wire
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Update
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.messages import Inbox, MaskedSum
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums


class SecureRank:
    """A rank's part: its shards of its clients' vectors, added up, then masked."""

    federation: Federation
    rank: int
    layout: Layout
    partition: Partition
    ring: RingShard
    masked_S: np.ndarray

    def masked(self, inboxes: dict[int, Inbox], sent: Sent) -> Any:
        """Third trip: does what the first rank says, until it says that nothing is left."""
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0)
            if told[0] is None:
                return None
            self.obey(sent, *told[0])

    def obey(self, sent: Sent, method: str, *arguments: Any) -> Any:
        """One of the following, `secure_own` from what the clients are sent."""
        if method == "secure_own":
            return self.secure_own(arguments[0], sent)
        return self.clear_own(arguments[0], sent.round) if method == "clear_own" else self.mask_own(arguments[0])

    def clear_own(self, sums: Sums, round_: int) -> None:
        """Nobody has been added yet."""
        live = live_masks(self.federation, self.layout, round_)
        self.ring = RingShard(sums, self.partition, self.rank, live)

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
        self, session: Session, removals: Masks, count: int, weight: float, *masked: np.ndarray
    ) -> tuple[dict[str, float], WireAggregate]:
        """The server's part for this rank's shard of all slots' masked vectors: figures, and the sums in the store."""
        live = live_masks(self.federation, self.layout, session.round)
        ring = RingShard(session.sums, self.partition, self.rank, live)
        return ring.unmasked(list(masked), removals, count, weight)

    def trained(self, client: int, sent: Sent) -> tuple[Report, Update | None]:
        """Trains a client: its report, and its shard of the update."""
        raise NotImplementedError

    def summed(self, value: float) -> float:
        """The sum over all ranks."""
        raise NotImplementedError


class SecureGang(SecureClients, SecureRank):
    """The first rank's part: the protocol. It tells the others what to do by collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent | None = None
        self._stale = True

    def masked(self, inboxes: dict[int, Inbox], sent: Sent) -> tuple[list[Report], MaskedSum]:
        """Third trip: trains, and gives the masked head; the reports tell no figures."""
        assert self._opened is not None
        self.sent = sent
        if self._stale:
            self._everywhere("clear_own", self._opened.session.sums)
            self._stale = False

        def train(pack: Unit, sums: Sums) -> list[tuple[Report, np.ndarray | None]]:
            (client,) = pack
            report, weight = self._everywhere("secure_own", client)
            return [(report, None if weight is None else sums.encode_head(weight))]

        found = self.mask(inboxes, train)
        dist.broadcast_object_list([None], src=0)
        return found

    def _clear(self, sums: Sums) -> None:
        self._total_L = np.zeros(len(sums.encode_head(1.0)), np.uint32)
        self._stale = True  # the ranks hear of it when they listen

    def _masked(self, masks: list[Masks], bits: int) -> np.ndarray:
        self._everywhere("mask_own", masks)
        return super()._masked(masks, bits)

    def _everywhere(self, *told: Any) -> Any:
        assert self.sent is not None
        dist.broadcast_object_list([told], src=0)
        return self.obey(self.sent, *told)


def aggregate_of(sums: Sequence[PartialSum | WireAggregate]) -> Aggregate | None:
    """A shard of the sum over all slots: exact parts, or one that secure aggregation has unmasked; None of nobody."""
    parts = [one for one in sums if isinstance(one, PartialSum)]
    secured = [one for one in sums if isinstance(one, WireAggregate)]
    return aggregate_from_wire(secured[0]) if secured else merge(parts) if parts else None
