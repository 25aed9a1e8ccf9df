"""Each client of a round is in the sum once: a slot that adds one twice is found out."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import ray.cloudpickle
import torch

from datasets_partition.store.build import build
from engine.aggregation.exact_sum import ExactSum
from engine.messages.broadcast import BroadcastMessage
from engine.messages.tasks import Work
from engine.rounds.collectors import ClearCollector
from engine.rounds.server import DriverServer
from engine.scheduling.pool import Pool
from engine.workers.worker import ClientActor
from strategies.core.protocol import ServerState

CLIENTS = np.arange(3)


class SumOfTwice(ExactSum):
    """Adds the first client twice."""

    def add(self, update):
        if not self.count:
            super().add(update)
        super().add(update)


class Twice(ClientActor):
    """Adds the first client that it is given to its sum twice, once it was asked to."""

    def deceive(self):
        self.sum = SumOfTwice()


def test_a_client_that_is_added_twice_ends_the_round(ray_session, small_recipe, tmp_path, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(Pool, "client", Twice)
    recipe = small_recipe()
    data = recipe.data
    store = build(data.source, data.partition, data.splits, recipe.seed, data.cache)
    slots = Pool.start(recipe, tmp_path, store)
    state = ServerState(0, torch.from_numpy(slots.initial.copy()), layout=slots.layout, seed=recipe.seed)
    work = Work(CLIENTS, np.ones(3), np.ones(3))
    message = replace(BroadcastMessage.of(recipe.strategy.broadcast(state)), full_rows=20)
    collector = ClearCollector(recipe, DriverServer(recipe, slots, len(CLIENTS)))
    try:
        (aggregate,) = collector.collect(work, message).sums
        assert aggregate.count == 3
        ray.get(slots.actors[0].deceive.remote())
        with pytest.raises(AssertionError, match="4 updates in the sum, and 3 clients"):
            collector.collect(work, message)
    finally:
        slots.stop()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
