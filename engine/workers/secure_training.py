"""What every rank of a worker does in a secured round: trains its clients into a ring sum, and masks its shard of it.

The first rank plays the protocol and holds the clients' secrets (SecureClients); the masks are all that others get.
"""

import numpy as np

from engine.aggregation.accumulators import RingSum
from engine.aggregation.ring_encoding import live_masks
from engine.aggregation.ring_shard import RingShard
from engine.aggregation.secure_clients import SecureWork
from engine.messages.broadcast import BroadcastMessage
from engine.messages.reports import Report
from engine.workers.client_runner import ClientRunner
from strategies.core.layout import Layout
from strategies.core.sharding import Partition
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Session


class SecureTraining:
    """A worker's ring sum of the present round; `layout` is that of whole vectors, `partition` cuts them for ranks."""

    def __init__(self, runner: ClientRunner, layout: Layout, partition: Partition | None = None) -> None:
        self.runner, self.layout, self.partition = runner, layout, partition
        self.ring: RingSum | None = None

    def train(self, work: SecureWork, message: BroadcastMessage) -> list[Report]:
        """Trains the clients that are pending and adds them up."""
        if work.fresh or self.ring is None:
            federation, summed = self.runner.federation, self.runner.peers.summed
            shard = self.shard(work.session)
            self.ring = RingSum(shard, federation, message.dp, message.round, summed)
        return self.runner.run(work.units, message, self.ring) if work.units else []

    def masked(self, masks: list[Masks]) -> np.ndarray:
        """Returns the ring sum, or a rank's shard of it, under all these masks; the head comes first."""
        assert self.ring is not None
        return self.ring.masked(masks)

    @property
    def head(self) -> int:
        """How many coordinates of a masked sum are the head."""
        assert self.ring is not None
        return self.ring.shard.head

    def shard(self, session: Session) -> RingShard:
        """Returns where this rank's coordinates lie in a session's ring vector."""
        live = live_masks(self.runner.federation, self.layout, session.round)
        return RingShard(session.sums, live, self.partition, self.runner.peers.rank or 0)
